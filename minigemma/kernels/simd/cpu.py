"""What the vectors of this processor are, found once when the package is imported."""

import numba
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name, initialize_native_asmparser

from ...environment import setting

# MINIGEMMA_CPU forces a path below the processor's own, so that tests can run it: "dots" disables AMX, "vectors" also
# AVX-512's dot products in matmul, "generic" all of AVX-512 and F16C as well. "emulated" emulates AMX with plain loops
# (amx.py), "dots" the dot products that the processor lacks. Numba's cache is keyed by these features, so code compiled
# for one path never runs on another.
PATHS = ("vectors", "dots", "generic", "emulated")
FORCED = setting("MINIGEMMA_CPU", PATHS)
_features = get_host_cpu_features()
_disabled = ("avx512", "avx10", "amx", "f16c") if FORCED == "generic" else ("amx",) if FORCED else ()
if any(_features[name] and name.startswith(_disabled) for name in _features):
    for _name in _features:
        _features[_name] = _features[_name] and not _name.startswith(_disabled)
    numba.config.CPU_FEATURES = _features.flatten()

LANES = 16 if _features.get("avx512f") else 8  # float32 numbers in a vector: AVX-512, else AVX2 or two of NEON
ROWS = 12 if LANES == 16 else 6  # of a tile: its sums take 24 of 32 registers, or 12 of 16
F16C = bool(_features.get("f16c"))  # converts float16 in one instruction
VNNI = LANES == 16 and bool(_features.get("avx512vnni"))  # vpdpbusd: multiplies and adds four pairs of bytes
BF16 = LANES == 16 and bool(_features.get("avx512bf16"))  # vdpbf16ps: multiplies and adds two pairs of bf16
# The dot products that matmul uses besides float32 and int16. The cost of rounding x for them can be measured on any
# processor: MINIGEMMA_CPU=dots python docs/make_accuracy.py --only weights
_dots = {"vdpbf16ps": BF16, "vpdpbusd": VNNI}
DOTS = tuple(name for name, there in _dots.items() if FORCED == "dots" or (there and not FORCED))
# Places from which a thread reads weights at once: AMD's Zen reads up to a quarter faster from two, Intel's slower.
STREAMS = 2 if get_host_cpu_name().startswith("znver") else 1
AHEAD = 8192  # bytes to prefetch ahead in a weight: the processor's own prefetcher stops at each page of 4 KiB
if VNNI or BF16:
    initialize_native_asmparser()


def paths() -> dict[str, str]:
    """Which path of each kind of kernel runs on this processor, and why."""
    forced = FORCED == "generic"
    wide, why = bool(_features.get("avx512f")), ", as MINIGEMMA_CPU=generic asks" if forced else ""
    instructions = (
        "AVX-512" if wide else "AVX2" if _features.get("avx2") else "the compiler's choice for this processor"
    )
    missing = "" if wide else f"; AVX-512 is not {'used' + why if forced else 'there'}"
    return {
        "vectors": f"{LANES} float32 numbers ({instructions}{missing})",
        "blocks of many tokens": f"{ROWS} x {2 * LANES} sums in registers",
        "int8": f"16-bit products in pairs, {LANES} sums at once"
        + ("; of many tokens 8-bit products in fours" if "vpdpbusd" in DOTS else ""),
        "int4, 16 rows at once": "8-bit products in fours (VNNI)" if VNNI else "8-bit products in pairs",
        "places read from at once": f"{STREAMS}, the faster choice on {'AMD' if STREAMS > 1 else 'most'} processors",
        "float16 scales": "an instruction (F16C)" if F16C else f"bit operations{why}",
    }
