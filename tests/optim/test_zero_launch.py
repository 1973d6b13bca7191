"""DiGraP under DeepSpeed as it is started: Hugging Face Trainer, Accelerate, torchrun and DeepSpeed's launcher.

Every run is a process of its own, or two; ``zero_launched.py`` is what they run.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.optim import zero_launched

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tests" / "optim" / "zero_launched.py")
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


def start(folder: Path, cases: list[str], launcher: str = "python", name: str = "") -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *at],
        "deepspeed": [sys.executable, str(BIN / "deepspeed"), "--num_accelerators", "2", *at],
    }[launcher]
    env = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    arguments = [SCRIPT, *cases, "--folder", str(folder), f"--name={name}"]
    done = subprocess.run(command + arguments, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{launcher} {cases}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert not (folder / "extensions").exists(), "something was compiled"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the pre-trained model, and what one process without DeepSpeed makes of it."""
    folder = tmp_path_factory.mktemp("launched")
    zero_launched.save_model(folder)
    start(folder, ["plain", "trainer", "trainer-by-class"])
    return folder


@pytest.fixture(scope="module")
def under_torchrun(folder: Path) -> Path:
    cases = ["trainer-zero2", "trainer-zero3", "trainer-zero2-resumed", "trainer-zero3-resumed"]
    cases += ["trainer-by-class-zero2", "trainer-unattached", "trainer-adamw", "trainer-twice"]
    cases += ["accelerate-zero2", "accelerate-zero3", "engine-zero2", "engine-zero3"]
    start(folder, cases, "torchrun")
    return folder


def result(folder: Path, case: str) -> dict[str, Any]:
    return torch.load(folder / f"{case}.pt")


def assert_same(folder: Path, case: str, other: str, tolerance: float) -> None:
    """Every layer, as a part of the distance that it travelled."""
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    start = {name: param.detach() for name, param in model.named_parameters()}
    found, expected = result(folder, case)["params"], result(folder, other)["params"]
    assert set(found) == set(expected) == set(start)
    for name, theta in expected.items():
        travelled = (theta - start[name]).norm()
        assert travelled > 0.05, name
        difference = float((found[name] - theta).norm() / travelled)
        assert difference <= tolerance, f"{case}, {name}: {difference:.1e} of the distance travelled"


def assert_projected(case: dict[str, Any]) -> None:
    assert case["omega"] > 0.1
    assert case["conflicts"] > 20


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_equals_trainer_without_deepspeed(under_torchrun: Path, stage: int):
    """Accumulation, clipping, a warm-up schedule, ``optimizers=(DiGraP(...), None)``; stage 3 loads into partitions."""
    assert_same(under_torchrun, f"trainer-zero{stage}", "trainer", 1e-5)
    found, expected = (result(under_torchrun, case) for case in (f"trainer-zero{stage}", "trainer"))
    assert_projected(expected)
    assert found["conflicts"] == expected["conflicts"]
    assert found["step"] == zero_launched.STEPS
    assert found["stats"] == pytest.approx(expected["stats"], abs=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_resumes_bit_equal(under_torchrun: Path, stage: int):
    """The engine loads before the optimizer is attached, which then takes over anchors, moments, ω."""
    assert_same(under_torchrun, f"trainer-zero{stage}-resumed", f"trainer-zero{stage}", 0.0)
    resumed, whole = (result(under_torchrun, f"trainer-zero{stage}{kind}") for kind in ("-resumed", ""))
    assert 0 < resumed["conflicts"] < whole["conflicts"]
    assert resumed["stats"] == whole["stats"]


def test_trainer_makes_the_optimizer_from_its_class(under_torchrun: Path):
    assert_same(under_torchrun, "trainer-by-class-zero2", "trainer-by-class", 1e-5)


def test_trainer_without_the_callback_ends_in_the_line_to_add(under_torchrun: Path):
    found = result(under_torchrun, "trainer-unattached")
    assert found["step"] == 0
    assert found["error"].startswith("UnattachedError")
    assert "scale_digrap.deepspeed.attach(engine)" in found["error"]


def test_callback_refuses_another_optimizer_and_a_second_engine(under_torchrun: Path):
    other = result(under_torchrun, "trainer-adamw")
    assert other["step"] == 0
    assert "the engine steps AdamW, not DiGraP" in other["error"]
    assert "second DeepSpeed engine" in result(under_torchrun, "trainer-twice")["error"]


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_equals_one_process(under_torchrun: Path, stage: int):
    assert_same(under_torchrun, f"accelerate-zero{stage}", "plain", 1e-5)
    assert_projected(result(under_torchrun, f"accelerate-zero{stage}"))


def test_deepspeed_launcher_equals_torchrun(under_torchrun: Path):
    start(under_torchrun, ["engine-zero2", "engine-zero3"], "deepspeed", name="-launcher")
    for stage in (2, 3):
        assert_same(under_torchrun, f"engine-zero{stage}", "plain", 1e-5)
        assert_same(under_torchrun, f"engine-zero{stage}-launcher", f"engine-zero{stage}", 0.0)
        assert_projected(result(under_torchrun, f"engine-zero{stage}-launcher"))
