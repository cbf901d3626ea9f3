"""How weights lie in memory or in a file: pack and unpack in NumPy, bit by bit.

Four layouts run, one of them in two sizes; `load(…, dtype=…)` names them:

    f32             float32 [R, D]             32 bits a weight
    bf16            uint16  [R, D]             16
    int8            uint8   [R, D/32, 34]      8.5     blocks of 32 with a float16 scale (GGUF's Q8_0)
    int4            uint8   [R/16, D/32, 320]  5       … with a minimum beside the scale, sixteen rows interleaved
    int4-symmetric  uint8   [R/16, D/32, 288]  4.5     … without: all minima are -8 scales

The others are stored forms. They are read, and some are written, but converted while loading:

    sfp8      1 byte a weight in the file → bf16, 2 bytes            (sfp8.py)
    int8-row  1 byte                      → int8, 1.06 bytes         (rows.py)
    int4-row  ½ byte                      → int4-symmetric, 0.56 bytes  (rows.py)
    Q4_0      0.56 bytes                  → int4-symmetric, 0.56 bytes  (int4.py)
    Q4_1, Q4_K  0.63 and 0.56 bytes       → int4, 0.63 bytes         (int4.py)
    Q5_0, Q5_1, Q5_K, Q6_K and others     → int8, 1.06 bytes         (gguf_blocks.py)

What a new layout needs: a file here that ends in its `Layout` (bits, shape of the array, pack, unpack); a line in
LAYOUTS; in kernels/weights.py a NamedTuple, which is how kernels see it; an entry for that NamedTuple in each `by_type`
of kernels/matvec.py and kernels/matmul.py (prepare x, multiply a row, unpack a panel); and a row of the table in
kernels/dispatch.py. A stored form needs its `Layout` and a line in STORED; files/convert.py says what it becomes.
"""

from . import bf16, f32, int4, int8, rows, sfp8
from .weight import Adapted, Layout, Weight

LAYOUTS = {each.name: each for each in (f32.LAYOUT, bf16.LAYOUT, int8.LAYOUT, int4.LAYOUT, int4.SYMMETRIC)}
STORED = {layout.name: layout for layout in (sfp8.LAYOUT, rows.INT8, rows.INT4)}

__all__ = ["LAYOUTS", "STORED", "Adapted", "Layout", "Weight"]
