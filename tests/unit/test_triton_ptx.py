"""The Triton kernels compile for a GPU without having one, and the code has no forbidden memory accesses.

The compiler needs no GPU. It produces PTX text and, with the assembler that comes with Triton, machine code.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tropd_mcore.kernel import triton_kernels
from tropd_mcore.kernel.triton_backend import BLOCK_COLUMNS, MERGE_PAIRS, WARPS
from tropd_mcore.sentinels import LEAST_LOGIT

SM_90 = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
REGISTERS_FOR_TWO_PROGRAMS = 65536 // (2 * WARPS * 32)
"""Of a thread, where two programs share the registers of an SM."""


@dataclass(frozen=True)
class Variant:
    """Element types as Triton writes them, and what is constant in a compilation."""

    logits: str
    output: str
    math: str = "fp32"
    slot_block: int = 128
    with_entropy: bool = True
    with_dense: bool = False
    softcap: float | None = None
    ones: tuple[str, ...] = ()
    """Integers that are 1, which Triton compiles for"""


TRAINING = {
    "bf16-in-place": Variant("bf16", "bf16"),
    "fp32-in-place": Variant("fp32", "fp32", with_entropy=False),
    "fp32-shrunk-to-bf16": Variant("fp32", "bf16", slot_block=512),
}
VARIANTS = TRAINING | {
    "fp64-in-place": Variant("fp64", "fp64", "fp64", with_dense=True, softcap=30.0),
    "one-of-everything": Variant(
        "fp32",
        "bf16",
        slot_block=1,
        ones=("logits_stride", "out_stride", "width", "real_width", "slots", "shard_start"),
    ),
}


@dataclass(frozen=True)
class Code:
    ptx: str
    cubin: bytes

    def accesses(self) -> list[str]:
        """The accesses of the code to global memory, and its barriers, in the order of the text.

        That of execution too, where a loop's body has no branches: not in float64, whose exponential has some.
        """
        return re.findall(r"ld\.global|st\.global|bar\.sync", self.ptx)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels are compiled again here, without a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], ones: tuple[str, ...]) -> Code:
    """A kernel for sm_90. Pointers, strides and the width are multiples of 16, as in training, or 1; others int32."""
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    names = kernel.arg_names
    constants = constants | {name: 1 for name in names if name in ones}
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = {*types, "logits_stride", "out_stride", "width"} - constants.keys()
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=SM_90, options={"num_warps": WARPS, "num_stages": 1})
    return Code(made.asm["ptx"], made.asm["cubin"])


def stats_code(variant: Variant) -> Code:
    types = {"logits_ptr": variant.logits, "ids_ptr": "i64", "stats_ptr": variant.math, "support_ptr": variant.math}
    constants = {
        "TEMPERATURE": 0.7,
        "SOFTCAP": variant.softcap,
        "EMPTY_MAX": LEAST_LOGIT,
        "BLOCK": BLOCK_COLUMNS,
        "SLOT_BLOCK": variant.slot_block,
    }
    types = {name: f"*{kind}" for name, kind in types.items()}
    return compiled(triton_kernels.stats_and_support_kernel, types, constants, variant.ones)


def gradient_code(variant: Variant) -> Code:
    types = {"logits_ptr": variant.logits, "out_ptr": variant.output, "ids_ptr": "i64"}
    types |= dict.fromkeys(("grad_logp_ptr", "lse_ptr", "entropy_ptr"), variant.math) | {"live_ptr": "i8"}
    constants = {
        "TEMPERATURE": 0.7,
        "SOFTCAP": variant.softcap,
        "MERGE": variant.slot_block > 1,
        "BLOCK": BLOCK_COLUMNS,
        "SLOT_BLOCK": variant.slot_block,
        "SLOT_TILE": min(variant.slot_block, MERGE_PAIRS // variant.slot_block),
    }
    for name, given in (("grad_entropy_ptr", variant.with_entropy), ("dense_ptr", variant.with_dense)):
        if given:
            types[name] = variant.math
        else:
            constants[name] = None
    types = {name: f"*{kind}" for name, kind in types.items()}
    return compiled(triton_kernels.write_gradient_kernel, types, constants, variant.ones)


@pytest.mark.parametrize(
    "name", [*TRAINING, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in TRAINING)]
)
def test_both_kernels_compile_for_sm_90_without_atomics(name: str) -> None:
    for code in (stats_code(VARIANTS[name]), gradient_code(VARIANTS[name])):
        assert ".target sm_90" in code.ptx and code.cubin.startswith(b"\x7fELF")
        assert not re.search(r"\b(atom|red)\.", code.ptx)


@pytest.mark.parametrize("name", TRAINING)
def test_all_threads_load_their_logits_before_any_thread_stores_over_them(name: str) -> None:
    """And no load goes through a cache that does not see stores, or is started early and waited for later."""
    code = gradient_code(TRAINING[name])
    pairs = re.findall(r"ld\.global(?:bar\.sync)*st\.global", "".join(code.accesses()))
    assert pairs and all("bar.sync" in pair for pair in pairs)
    assert "ld.global.nc" not in code.ptx and "cp.async" not in code.ptx


@pytest.mark.parametrize("name", TRAINING)
def test_the_support_is_stored_after_all_threads_have_stored_the_other_columns(name: str) -> None:
    accesses = "".join(gradient_code(TRAINING[name]).accesses())
    assert re.search(r"st\.global(bar\.sync)+(st\.global)+$", accesses)


def test_a_bfloat16_gradient_is_rounded_to_the_nearest() -> None:
    for variant in TRAINING.values():
        conversions = set(re.findall(r"cvt\.(?:\w+\.)*bf16(?:x2)?\.f32", gradient_code(variant).ptx))
        assert conversions <= {"cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32"}
        assert bool(conversions) == (variant.output == "bf16")


@pytest.mark.parametrize("name", TRAINING)
def test_logits_are_read_and_written_sixteen_bytes_at_a_time(name: str) -> None:
    wide = r"%s\.global\.v4\.b32"
    assert re.search(wide % "ld", stats_code(TRAINING[name]).ptx)
    for access in ("ld", "st"):
        assert re.search(wide % access, gradient_code(TRAINING[name]).ptx)


@pytest.mark.parametrize("name", TRAINING)
def test_two_programs_fit_on_a_multiprocessor_without_spilling_registers(name: str, tmp_path: Path) -> None:
    for code in (stats_code(TRAINING[name]), gradient_code(TRAINING[name])):
        registers, stack = resources(code, tmp_path)
        assert registers <= REGISTERS_FOR_TWO_PROGRAMS
        assert stack == 0


def resources(code: Code, folder: Path) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    file = folder / "kernel.cubin"
    file.write_bytes(code.cubin)
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])
