# SPDX-License-Identifier: LGPL-2.0-or-later
"""From libnbd.h to text: the cdef, the C glue and the Python modules of the package.

The way of a call: `header` reads libnbd.h into the plain data of `model`, `calls` adds what C
cannot say (what a return value means, the documentation), and one `emit_*` module each writes a
kind of text.
Every function from the model on is pure: model in, text out.
"""
