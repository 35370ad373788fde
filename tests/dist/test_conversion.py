"""Hugging Face -> Megatron -> Hugging Face across layouts: the same bytes, the same log-probs, clear refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.dist import conversion_ranks
from tests.ranks import run_on_ranks
from tests.tiny_models import FAMILIES, write_tiny_model
from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.errors import ModelError
from tropd_mcore.weights.families import hf_weight_plan
from tropd_mcore.weights.hf_folder import HfReader

REPOSITORY = Path(__file__).parents[2]
TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)
CASES = [(family, tied) for family in FAMILIES for tied in (False, True)]
LIMIT_NATS = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One tiny model per family, tied and untied, in bfloat16."""
    root = tmp_path_factory.mktemp("hf")
    return [
        write_tiny_model(root / f"{family}-{'tied' if tied else 'untied'}", family=family, tied=tied, dtype=dtype)
        for (family, tied), dtype in zip(CASES, [torch.bfloat16, torch.float32] * 3, strict=True)
    ]


def assert_same_bytes(left: Path, right: Path) -> None:
    expected, found = (load_file(folder / "model.safetensors") for folder in (left, right))
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name


def test_a_tp2_pp2_checkpoint_exports_the_same_bytes_from_every_layout(folders: list[Path], tmp_path: Path) -> None:
    checkpoints = [tmp_path / folder.name for folder in folders]
    run_on_ranks(conversion_ranks.to_mcore, 4, TP2_PP2, list(zip(folders, checkpoints, strict=True)))
    for parallel, ranks in [
        (ParallelConfig(), 1),
        (ParallelConfig(pipeline=2), 2),
        (ParallelConfig(tensor=2), 2),
        (TP2_PP2, 4),
    ]:
        out = tmp_path / f"tp{parallel.tensor}-pp{parallel.pipeline}"
        backs = [out / folder.name for folder in folders]
        run_on_ranks(conversion_ranks.to_hf, ranks, parallel, list(zip(checkpoints, backs, strict=True)))
        for folder, back in zip(folders, backs, strict=True):
            assert_same_bytes(folder, back)
            assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
            config = json.loads((back / "config.json").read_text())
            assert config == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("parallel", "ranks"), [(ParallelConfig(), 1), (TP2_PP2, 4)], ids=["one process", "tp2 pp2"])
def test_log_probs_of_a_converted_model_equal_those_of_transformers(
    folders: list[Path], parallel: ParallelConfig, ranks: int
) -> None:
    tokens = torch.randint(307, (40,), generator=torch.Generator().manual_seed(5))
    answers = run_on_ranks(conversion_ranks.log_probs_of, ranks, parallel, folders, tokens)
    for index, folder in enumerate(folders):
        found = [answer[index] for answer in answers if answer[index] is not None]
        assert len(found) == 1
        difference = (found[0] - transformers_log_probs(folder, tokens)).abs().max()
        assert difference <= LIMIT_NATS, (folder.name, difference)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ],
    ids=["linear", "llama3"],
)  # fmt: skip
def test_scaled_rotary_embeddings_equal_those_of_transformers(rope: dict[str, float | str], tmp_path: Path) -> None:
    folder = write_tiny_model(
        tmp_path / "m", family="llama", num_hidden_layers=2, max_position_embeddings=16384, rope_parameters=rope
    )
    tokens = torch.randint(307, (200,), generator=torch.Generator().manual_seed(6))
    (found,) = run_on_ranks(conversion_ranks.log_probs_of, 1, ParallelConfig(), [folder], tokens)[0]
    assert (found - transformers_log_probs(folder, tokens)).abs().max() <= LIMIT_NATS


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        (ParallelConfig(tensor=2, pipeline=2), 4),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), 4),
        (ParallelConfig(tensor=2, context=2), 4),
        (ParallelConfig(data=2), 2),
    ],
    ids=["tp2 pp2", "pp2 vpp2 dp2", "tp2 cp2", "dp2"],
)
def test_the_export_iterator_yields_every_planned_tensor_on_rank_0_at_every_layout(
    parallel: ParallelConfig, ranks: int, tmp_path: Path
) -> None:
    import hashlib

    folder = write_tiny_model(tmp_path / "m", tied=True)
    with HfReader(folder) as reader:
        plan = [name for name, _ in hf_weight_plan(reader.arch)]
        expected = [(name, hashlib.sha256(reader.tensor(name).numpy().tobytes()).hexdigest()) for name in plan]
    first, *others = run_on_ranks(
        conversion_ranks.names_and_digests, ranks, parallel, folder, parallel.virtual_pipeline is not None
    )
    assert first == expected
    assert not any(others)


def test_an_export_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=2)
    (tmp_path / "file").write_text("in the way")
    found = run_on_ranks(conversion_ranks.export_refused, 2, ParallelConfig(pipeline=2), folder, tmp_path / "file/out")
    assert len(set(found)) == 1 and "cannot write to" in found[0]


def test_a_tied_model_that_stores_another_output_layer_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = write_tiny_model(tmp_path / "m", tied=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tokens = torch.arange(8)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    run_on_ranks(conversion_ranks.log_probs_of, 1, ParallelConfig(), [folder], tokens)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(ModelError, match="tie_word_embeddings, but lm_head.weight differs"):
        run_on_ranks(conversion_ranks.log_probs_of, 1, ParallelConfig(), [folder], tokens)


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = write_tiny_model(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, path)
    with pytest.raises(ModelError, match="tensors are bfloat16, float32; expected all"):
        run_on_ranks(conversion_ranks.to_mcore, 1, ParallelConfig(), [(folder, tmp_path / "out")])


def test_the_scripts_convert_to_megatron_and_back_and_verify(tmp_path: Path) -> None:
    hf = write_tiny_model(tmp_path / "hf", family="qwen2", tied=True, dtype=torch.bfloat16)
    assert script("hf_to_mcore", "--hf", hf, "--out", tmp_path / "mcore").returncode == 0
    assert script("mcore_to_hf", "--mcore", tmp_path / "mcore", "--out", tmp_path / "back").returncode == 0
    assert_same_bytes(hf, tmp_path / "back")
    good = script("verify", "--hf", hf, "--mcore", tmp_path / "mcore", "--other-hf", tmp_path / "back")
    assert good.returncode == 0, good.stderr
    assert "all passed" in good.stdout
    other = write_tiny_model(tmp_path / "other", family="qwen2", tied=True, dtype=torch.bfloat16, seed=1)
    bad = script("verify", "--hf", other, "--mcore", tmp_path / "mcore")
    assert bad.returncode == 1
    assert "MISS" in bad.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("hf_to_mcore", ["--hf", "absent", "--out", "new"], "absent: not found"),
        ("mcore_to_hf", ["--mcore", "absent", "--out", "new"], "--mcore absent: not found"),
        ("hf_to_mcore", ["--hf", "model", "--out", "new", "--tensor", "2"], "launch a multiple of 2 ranks"),
    ],
)
def test_errors_of_the_scripts_are_one_line_with_exit_code_2(
    name: str, arguments: list[str], words: str, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "model", family="qwen2", tied=True, dtype=torch.bfloat16)
    done = script(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr


def script(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a conversion script as a user does."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "conversion" / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def transformers_log_probs(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens[None]).logits[0].log_softmax(-1)
