"""A made-up comparison of nine methods, with the layer names of the tiny VLM."""

from __future__ import annotations

import numpy as np

from scale_digrap.evaluation.registry import QUICKSTART
from scale_digrap.evaluation.results import Comparison, Method, MethodRun
from scale_digrap.evaluation.runner import Record, SuiteResult

METHODS = [
    Method(key="zero-shot", label="Zero-shot", family="base"),
    Method(key="full-adamw", label="AdamW", family="full", baseline="zero-shot"),
    Method(key="full-digrap", label="DiGraP", family="full", baseline="full-adamw"),
    Method(
        key="full-digrap-wise",
        label="DiGraP + WiSE-FT",
        family="full",
        baseline="full-digrap",
        variant_of="full-digrap",
    ),
    Method(key="lora-adamw", label="LoRA AdamW", family="lora", baseline="zero-shot"),
    Method(key="lora-digrap", label="LoRA DiGraP", family="lora", baseline="lora-adamw"),
]
ACCURACY = {
    "zero-shot": (0.78, 0.75, 0.76, 0.77, 0.74, 0.92),
    "full-adamw": (0.97, 0.90, 0.88, 0.70, 0.62, 0.72),
    "full-digrap": (0.97, 0.91, 0.88, 0.74, 0.66, 0.80),
    "full-digrap-wise": (0.92, 0.88, 0.86, 0.78, 0.70, 0.90),
    "lora-adamw": (0.95, 0.88, 0.86, 0.73, 0.65, 0.82),
    "lora-digrap": (0.94, 0.88, 0.87, 0.75, 0.67, 0.85),
}


def layer_names() -> list[str]:
    names = []
    for layer in range(4):
        block = f"model.vision_tower.vision_model.encoder.layers.{layer}"
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            names += [f"{block}.{module}.weight", f"{block}.{module}.bias"]
        names += [f"{block}.layer_norm1.weight", f"{block}.mlp.fc1.weight", f"{block}.mlp.fc2.weight"]
    names.append("model.multi_modal_projector.linear.weight")
    names.append("model.language_model.embed_tokens.weight")
    for layer in range(4):
        block = f"model.language_model.layers.{layer}"
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            names.append(f"{block}.self_attn.{module}.weight")
        names += [f"{block}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        names.append(f"{block}.input_layernorm.weight")
    return names


def comparison(seeds: int = 1, questions: int = 200, missing: str | None = None) -> Comparison:
    suites = list(QUICKSTART.values())
    runs = []
    for seed in range(seeds):
        for method in METHODS:
            if method.key == "zero-shot" and seed:
                continue
            rng = np.random.default_rng([seed, METHODS.index(method)])
            results = {}
            for suite, accuracy in zip(suites, ACCURACY[method.key], strict=True):
                if suite.name == missing and method.key == "lora-digrap":
                    continue
                difficulty = np.random.default_rng(suites.index(suite)).random(questions)
                right = difficulty + rng.normal(0, 0.05, questions) < accuracy
                records = [
                    Record(f"{i:05d}", "circle" if r else "triangle", ["circle"], float(r), "shape")
                    for i, r in enumerate(right)
                ]
                results[suite.name] = SuiteResult(suite.name, suite.metric, records, 1.0)
            run = MethodRun(method=method.key, seed=seed, suites=results, seconds={"train": 41.0, "evaluate": 6.0})
            run.provenance = {"checkpoint": f"{method.key}-seed{seed}", "template": {"prompt": "{question}"}}
            if method.variant_of is not None:
                run.provenance["alpha"] = 0.5
            names = layer_names() if method.family == "full" else [n for n in layer_names() if "q_proj" in n]
            if method.key != "zero-shot" and method.variant_of is None:
                run.training = {"steps": 150, "final loss": 0.1234}
                run.drift = {name: {"drift": 1.0, "relative_drift": float(rng.lognormal(-3, 0.6))} for name in names}
            if method.key.endswith("digrap"):
                run.telemetry = [
                    {
                        "step": step,
                        "layers": {
                            name: {
                                "omega": float(np.clip(rng.normal(0.5 * np.exp(-step / 60), 0.1), 0, 1)),
                                "conflict_rate": float(rng.random()),
                            }
                            for name in names
                        },
                    }
                    for step in range(10, 151, 10)
                ]
            runs.append(run)
    return Comparison(
        methods=METHODS, suites=suites, runs=runs, title="A made-up comparison", settings={"steps": 150},
        environment={"commit": "0123456789ab", "machine": "nowhere"},
    )  # fmt: skip
