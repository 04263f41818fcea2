# SPDX-License-Identifier: LGPL-2.0-or-later
"""The way from libnbd.h to the generated files of the package, one module for each step.

1. `library` finds libnbd with pkg-config.
2. `preprocess` runs the C preprocessor on libnbd.h.
3. `read` parses the result and makes the model of it. `constants` computes the values of macros.
4. `model` is the data: functions, callback types and constants, without any text.
5. `calls` adds what C cannot say: what a return value means, and the documentation.
6. Each `emit_*` module writes one text: `emit_glue_header` writes nbdglue.h, `emit_glue_source`
   nbdglue.c, `emit_cdef` the declarations for cffi, `emit_methods` methods.py, `emit_upcalls`
   upcalls.py, `emit_constants` constants.py and `emit_build` build.py.
7. `text` holds what the emitters share: the banner and the breaking of long lines.

Every function from the model on is pure: model in, text out.
"""
