# SPDX-License-Identifier: LGPL-2.0-or-later
"""From libnbd.h to the generated files of the package, with one module for each step.

1. `library` finds libnbd with pkg-config.
2. `preprocess` runs the C preprocessor on libnbd.h.
3. `read` parses the result into a model. `constants` computes the values of macros.
4. `model` is the data: functions, callback types and constants, without any text.
5. `waiting` determines how each call waits for the server.
6. `calls` adds what C declarations do not express: the meaning of results, and the documentation.
7. Each `emit_*` module writes one text: `emit_glue_header` writes nbdglue.h, `emit_glue_source`
   nbdglue.c, `emit_cdef` the declarations for cffi, `emit_methods` methods.py, `emit_upcalls`
   upcalls.py, `emit_constants` constants.py and `emit_build` build.py.
8. `text` has what the emitters share: the banner and the breaking of long lines.

Every function after the model is pure: model in, text out.
"""
