"""The methods side by side on the quick-start's model and data: what each gains in distribution, and what it forgets.

    python benchmarks/methods.py --work runs/methods [--seeds 1] [--steps 150]

Full fine-tuning in one process, 150 steps of 64, learning rate 1e-3, which was chosen for AdamW; the strengths of the
others were tried on this very model. A toy: 1.7 M parameters, 500 questions a suite. Everything runs through the
public commands, and what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
METHODS = {
    "adamw": ("AdamW", ["optimizer.name=adamw"]),
    "digrap": ("DiGraP, μ = 0.5", ["optimizer.name=digrap", "optimizer.omega_lr=0.5"]),
    "ftp": ("FTP, k = 0.5", ["optimizer.name=ftp", "optimizer.gamma_k=0.5"]),
    "spd": ("SPD, λ = 1", ["optimizer.name=spd", "optimizer.strength=1.0"]),
    "l2sp": ("L2-SP, λ = 0.03", ["optimizer.name=l2sp", "optimizer.strength=0.03"]),
}


def command(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "scale_digrap", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    data, models = args.work / "data", {"zero-shot": {"path": "builtin:tiny-vlm", "label": "Zero-shot"}}
    if not data.exists():
        command("shards", "write", "easy-vqa", "--to", data)
    for seed in range(args.seeds):
        for name, (label, settings) in METHODS.items():
            run = args.work / f"{name}-seed{seed}"
            if not (run / "DONE").exists():
                steps = [f"training.steps={args.steps}", f"checkpoint.every={args.steps}", "checkpoint.resume=auto"]
                common = ["training.batch_size=64", *steps]
                where = [f"run_dir={run}", f"training.seed={seed}", f"data.train=[{data}/train/*.tar]"]
                command("train", CONFIG, *settings, *common, *where)
            models[f"{name}-seed{seed}"] = {"run": str(run), "method": name, "seed": seed, "label": label}
    out = args.work / f"evaluation-{args.seeds}"
    evaluation = {
        "out": str(out),
        "title": "Methods on the quick-start's model",
        "suites": {"set": "quickstart", "folder": str(data / "suites")},
        "models": models,
        "baseline": "zero-shot",
        "batch_size": 100,
        "generation": {"max_new_tokens": 4},
    }
    file = args.work / "evaluate.yaml"
    file.write_text(json.dumps(evaluation))
    command("evaluate", file)
    for page in sorted(out.glob("*.md")):
        print(page.read_text())


if __name__ == "__main__":
    main()
