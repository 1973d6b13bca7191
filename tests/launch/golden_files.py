"""What is shipped in ``launch/`` and kept in ``golden/``: ``python -m tests.launch.golden_files`` renders it anew.

Look at the difference before you commit it: it is what users will run.
"""

from __future__ import annotations

from pathlib import Path

from scale_digrap.launch.render import render
from scale_digrap.launch.spec import load_spec
from scale_digrap.launch.workload import Workload, load_workload

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "launch"
GOLDEN = Path(__file__).parent / "golden"
CONFIG = "configs/paligemma_vqav2_lora.yaml"
TEMPLATES = (
    "torchrun.sh",
    "deepspeed.sh",
    "slurm.sbatch",
    "kubernetes/job.yaml",
    "kubernetes/jobset.yaml",
    "kubernetes/trainjob.yaml",
)


def example() -> Workload:
    """The command that the shipped files start."""
    return load_workload("train", str(ROOT / CONFIG), ["run_dir=/shared/runs/vqav2-lora"])


def rendered() -> dict[Path, str]:
    """Path → what it should hold: every template with the shipped example, and with all options."""
    import dataclasses

    plain = dataclasses.replace(example(), config=CONFIG)
    rich = dataclasses.replace(plain, overrides=("run_dir=/shared/runs/a b", "model.prompt=Q's: {question} $1"))
    spec = load_spec(SHIPPED / "launch.example.yaml")
    everything = load_spec(GOLDEN / "everything.yaml")
    files = {SHIPPED / name: render(name, spec, plain) for name in TEMPLATES}
    return files | {GOLDEN / name.replace("kubernetes/", ""): render(name, everything, rich) for name in TEMPLATES}


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")
        print(path)
