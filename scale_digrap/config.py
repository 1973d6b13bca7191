"""The one typed configuration of a training run.

Dataclasses of which :mod:`scale_digrap.settings` makes the schema: every key of a YAML file or of a ``key=value``
override is checked against them. This module imports no torch, so that ``scale-digrap --help`` and ``--print-config``
are instant.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from scale_digrap.bounds import OPTION_BOUNDS
from scale_digrap.duration import seconds
from scale_digrap.runtime.files import write_whole
from scale_digrap.settings import ConfigError, PathText, read_structured, read_values, shown, suggest, to_yaml
from scale_digrap.zero_config import ZeroConfig, zero_problem

__all__ = ["Config", "ConfigError", "load_config", "suggest"]


@dataclass(kw_only=True)
class ModelConfig:
    """Which checkpoint, and which of its parameters are trained."""

    path: PathText = "builtin:tiny-vlm"
    """Local folder or hub id of an image-text-to-text checkpoint, a saved LoRA adapter, or ``builtin:tiny-vlm``."""

    revision: Optional[str] = None  # noqa: UP045
    """Hub revision; None takes the default branch."""

    attention: Optional[str] = None  # noqa: UP045
    """Attention implementation of Transformers (``sdpa``, ``eager``, ``flash_attention_2``); None lets it choose."""

    prompt: str = "Question: {question} Answer:"
    """The prompt around a question, the same one in training and in evaluation. Must contain ``{question}``."""

    answer: str = "{answer}"
    """What the model learns to write after the prompt. Must contain ``{answer}``."""

    chat_template: bool = True
    """Put the prompt into the processor's chat template, where it has one."""

    max_length: Optional[int] = None  # noqa: UP045
    """Longest sequence in tokens, image tokens and answer included; longer questions are cut at a word and counted."""

    freeze: list[str] = field(default_factory=list)
    """Regular expressions (``re.search`` on parameter names) of what is not trained. Not with LoRA."""

    new_layers: list[str] = field(default_factory=list)
    """Regular expressions of trained parameters without a pre-trained value: no anchor, plain AdamW."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters through peft. The adapters are fp32, the base keeps the compute precision and is frozen."""

    enabled: bool = False
    """Train adapters in place of the weights."""

    rank: int = 8
    """Rank r of the update B·A."""

    alpha: float = 16.0
    """The update is scaled by alpha / r."""

    dropout: float = 0.0
    """Dropout on the adapter's input."""

    targets: list[str] = field(default_factory=lambda: [r"language_model.*\.(q|k|v|o)_proj$"])
    """Regular expressions (``re.search``) on the names of linear modules that get an adapter."""

    train: list[str] = field(default_factory=list)
    """Regular expressions on the names of base modules trained in full besides the adapters (``modules_to_save``)."""


@dataclass(kw_only=True)
class SourceConfig:
    """One data set of a mixture."""

    shards: list[PathText] = field(default_factory=list)
    """As in ``data.train``."""

    weight: float = 1.0
    """Its share of the samples, relative to the others' weights."""


@dataclass(kw_only=True)
class DataConfig:
    """Where the training samples come from."""

    train: list[PathText] = field(default_factory=list)
    """webdataset shards: folders, paths, globs, brace patterns such as ``vqa-{000000..000041}.tar``, ``manifest.json``
    files, or URLs (http(s), s3, gs, whatever fsspec knows)."""

    mixture: dict[str, SourceConfig] = field(default_factory=dict)
    """Several data sets in exact proportions, by name; in place of ``train``."""

    mixture_block: int = 1000
    """The proportions hold in every block of so many draws."""

    mixture_epoch: str = "all"
    """For ``training.epochs``: one epoch of a mixture is over when ``all`` of its data sets were seen, or the
    ``first``."""

    workers: int = 0
    """Loader processes per rank; 0 decodes in the training process (best on few cores)."""

    window: Optional[int] = None  # noqa: UP045
    """Shards that are shuffled together; None: as many as hold about a million samples, 16 where they are fetched."""

    lanes: int = 1
    """Parts of the shards that are read side by side. A multiple of the number of hosts makes every host fetch its own
    part only."""

    timeout_s: float = 600.0
    """Longest wait for a batch; a dead or stalled loader is an error. 0 waits for ever."""

    max_bad: Optional[int] = None  # noqa: UP045
    """Stop when more samples than this could not be decoded; 0 stops at the first. Each one is replaced by another
    sample, counted, and listed in ``run_dir/bad_samples.rank*.jsonl``."""

    max_bad_fraction: float = 0.01
    """Stop when more than this fraction of all samples could not be decoded (looked at from the eleventh on)."""

    image_size: Optional[int] = None  # noqa: UP045
    """Decode JPEGs at a half, a quarter or an eighth of their size, not below this many pixels, which is faster for
    large pictures; the model's image processor resizes either way. None decodes at full size."""

    classes: list[str] = field(default_factory=list)
    """Names of the class numbers in ``.cls`` fields; empty: those of the shards' manifest."""

    class_question: str = "What is in the picture?"
    """The question of a sample that is an image with a class."""

    cache_dir: Optional[PathText] = None  # noqa: UP045
    """Folder on a local disk for remote shards, and for indexes of shards that lie in a read-only place."""

    cache_gb: Optional[float] = None  # noqa: UP045
    """Bound of the cache in 10⁹ bytes; None sets none."""

    store_timeout_s: float = 60.0
    """For connecting to remote storage and for any wait for its data."""

    retries: int = 5
    """Attempts after a failed read or download, with pauses that double; then the run ends."""

    cache_shared: bool = False
    """Use a cache folder that other users can write to: they are trusted. Each shard is hashed once a process."""

    storage_options: dict[str, Any] = field(default_factory=dict)
    """For fsspec's file systems: ``profile``, ``endpoint_url``, ``anon``, ``key: ${oc.env:…}``, …; what stands under
    the name of a protocol (``s3: {profile: lab}``), for that one alone."""

    redirect_hosts: list[str] = field(default_factory=list)
    """Hosts that a web server may redirect to, besides itself."""

    allow_pipe: bool = False
    """Run ``pipe:COMMAND`` URLs in a shell."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """DiGraP, one of its siblings, or AdamW. A method ignores the others' options."""

    name: str = "digrap"
    """``digrap``, ``ftp`` (fast trainable projection), ``spd`` (selective projection decay), ``l2sp`` (penalty on the
    distance) or ``adamw``."""

    lr: float = 1e-4
    """Peak learning rate."""

    strength: Optional[float] = None  # noqa: UP045
    """λ of ``spd`` (default 0.5) and ``l2sp`` (default 0.01)."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's decay rates of the first and second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.0
    """Decoupled weight decay (towards zero, not towards the anchor)."""

    no_decay: list[str] = field(default_factory=list)
    """Regular expressions (``re.search`` on parameter names) of what ``weight_decay`` leaves alone."""

    decay_norms_and_biases: bool = True
    """False: ``weight_decay`` leaves parameters of fewer than two dimensions alone, which are norms and biases."""

    omega_lr: float = 0.5
    """Learning rate μ of the projection strength ω."""

    omega_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's decay rates for ω."""

    omega_max: float = 1.0
    """Upper bound κ of ω."""

    normalization: str = "row"
    """``row`` or ``tensor``: what one cosine of the hypergradient is taken over."""

    project_when: str = "conflict"
    """``conflict`` (the descent direction leads away from the anchor) or ``agree``."""

    gamma_lr: float = 1e-2
    """Learning rate μ of FTP's radius γ."""

    gamma_k: float = 1.0
    """k of ``ftp`` in [0, 1], the weight of what tightens the constraint; 1 is the strongest."""

    anchor: str = "auto"
    """``initial`` (the pre-trained weights), ``zero``, ``none`` (plain AdamW), or ``auto``: ``zero`` for LoRA adapters,
    ``initial`` for everything else. Parameters under ``model.new_layers`` never have an anchor."""

    anchor_dtype: str = "auto"
    """``auto`` (the narrowest type that holds the weights exactly), ``bfloat16`` or ``float32``."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, one value per optimizer step."""

    name: str = "cosine"
    """``cosine``, ``linear`` or ``constant`` after the warm-up."""

    warmup_steps: int = 0
    """Steps of linear warm-up."""

    warmup_init_ratio: float = 0.0
    """The warm-up starts at this fraction of ``optimizer.lr``."""

    min_lr_ratio: float = 0.0
    """``cosine`` and ``linear`` end at this fraction of ``optimizer.lr``."""


@dataclass(kw_only=True)
class TrainingConfig:
    """The loop."""

    steps: Optional[int] = None  # noqa: UP045
    """Optimizer steps; give this or ``epochs``."""

    epochs: Optional[float] = None  # noqa: UP045
    """Passes over the training set, rounded up to a whole step; give this or ``steps``."""

    batch_size: int = 8
    """Samples per rank and micro-batch. Global batch = batch_size × ranks × gradient_accumulation."""

    gradient_accumulation: int = 1
    """Micro-batches per optimizer step."""

    global_batch_size: Optional[int] = None  # noqa: UP045
    """Samples per optimizer step, in place of ``gradient_accumulation``: as many micro-batches as that takes on however
    many ranks there are. A run that goes on with fewer hosts, or more, trains as it would have."""

    clip_norm: Optional[float] = None  # noqa: UP045
    """Clip the global gradient norm to this; None does not clip."""

    precision: str = "fp32"
    """``fp32``, or ``bf16``: bf16 autocast, bf16 all-gathers and a bf16 frozen base. Trained weights stay fp32."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    seed: int = 0
    """Seed of the shuffle, of dropout and of everything initialised here."""

    deterministic: bool = False
    """Ask torch for deterministic kernels (slower; operations without one are errors)."""

    device: str = "auto"
    """``auto`` (the accelerator where there is one), ``cpu`` or ``cuda``."""

    keep_anchors: bool = False
    """Keep a copy of the pre-trained weights for ``TrainResult.anchored`` with AdamW too (DiGraP has them anyway;
    under DeepSpeed in another form): needed for WiSE-FT and for the drift per layer; 2 to 4 bytes a trained parameter,
    sharded like the parameters."""

    max_skipped_steps: int = 10
    """Stop after this many steps in a row with a non-finite gradient; each one is skipped and counted."""

    spike_threshold: float = 6.0
    """Report a loss that is this many standard deviations above the median of the last ``spike_window`` steps, with its
    samples; 0 reports none."""

    spike_window: int = 100
    """Steps to look back on for ``spike_threshold``."""

    max_time: Optional[str] = None  # noqa: UP045
    """Stop with a checkpoint after the step in which this much time has passed, for example ``3h50m``. Leave room for
    the start before it, and for one step and one checkpoint after it."""

    stop_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1", "SIGUSR2"])
    """Signals that stop the run with a checkpoint after the current step; one to any rank is enough."""

    timeout_s: float = 1800.0
    """Longest wait of a rank for the others in a collective, in seconds; then the run ends with an error. Ranks that
    read a large model are minutes apart."""

    stall_s: float = 600.0
    """When nothing has moved on a rank for this many seconds, it writes its stacks to ``run_dir/watchdog``; below
    ``timeout_s``. 0 watches nothing."""

    sync_check_every: int = 100
    """Every this many steps, and in the first, prove that all ranks hold the same replicated weights, the same ω and
    the same place in the data; 0 never does."""


@dataclass(kw_only=True)
class ShardingConfig:
    """How model, gradients and optimizer state are spread over the ranks."""

    engine: str = "fsdp"
    """``fsdp`` (FSDP2) or ``deepspeed`` (ZeRO). With one process nothing is sharded."""

    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """DeepSpeed's settings."""

    dp_replicate_size: int = 1
    """FSDP: number of replicas (HSDP); each shards over ranks / dp_replicate_size."""

    wrap: list[str] = field(default_factory=list)
    """FSDP: regular expressions (``re.fullmatch`` on module names) of the units besides the root. Empty:
    every block of the language model. Keep a vision tower in the root unit when some batches have no image."""

    load_sharded: bool = True
    """Read a checkpoint straight into the shards. False: every rank reads all of it first (memory for one full copy per
    rank), for an architecture without a sharding plan in Transformers."""

    reshard_after_forward: bool = True
    """FSDP: free gathered weights after the forward pass and gather them again in the backward pass: less memory, more
    traffic."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 0
    """Save every this many steps, and after the last one; 0 saves none."""

    keep: int = 2
    """How many of the newest checkpoints stay on disk."""

    keep_every: int = 0
    """Checkpoints of every this many steps stay for good; 0 keeps none."""

    background: bool = False
    """Copy the state to main memory and write it while training goes on: one copy of the state in main memory."""

    anchors: bool = True
    """Store DiGraP's anchors. False: they are the base's weights again, which must then be the same at resume."""

    on_error: str = "stop"
    """``stop`` or ``continue`` when a checkpoint cannot be written; older ones stay in either case."""

    on_damage: str = "fallback"
    """``fallback`` (the newest whole checkpoint before it, with a warning) or ``refuse`` when the newest is damaged."""

    resume: PathText = "auto"
    """``auto`` (the newest complete checkpoint of ``run_dir``, if any), ``never``, or the path of a checkpoint."""

    save_final: bool = True
    """Write the trained model (or adapter) and processor to ``run_dir/final`` in Hugging Face format."""

    final_dtype: str = "float32"
    """``float32`` (exact) or ``bfloat16`` for the model in ``run_dir/final``. Adapters are always fp32."""


@dataclass(kw_only=True)
class SuiteConfig:
    """One evaluation set."""

    shards: list[PathText] = field(default_factory=list)
    """Its webdataset shards, as in ``data.train``."""

    group: str = "id"
    """``id``, ``near`` or ``far``: which average the suite counts in."""

    shift: str = "none"
    """What differs from the training data: ``none`` (with group ``id``), ``vision``, ``question``, ``answer``,
    ``multimodal``, ``adversarial`` or ``skill``."""

    metric: str = "vqa/official"
    """How an answer is scored, see ``scale_digrap.evaluation.scorers``."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is measured after training."""

    suites: dict[str, SuiteConfig] = field(default_factory=dict)
    """Suites by name."""

    batch_size: int = 32
    """Samples per rank and generation batch."""

    max_new_tokens: int = 16
    """Longest generated answer in tokens."""

    workers: int = 0
    """Loader processes per rank."""


@dataclass(kw_only=True)
class LogConfig:
    """What a run tells about itself."""

    every: int = 1
    """Steps between two lines of ``log.jsonl``."""

    layers_every: int = 10
    """Steps between two lines of ``layers.jsonl`` (DiGraP's telemetry per layer); 0 writes none."""

    progress: bool = True
    """Progress bar on rank 0."""

    tensorboard: bool = False
    """Write TensorBoard events to ``run_dir/tensorboard`` (needs ``scale-digrap[tensorboard]``)."""

    wandb: bool = False
    """Log to Weights & Biases (needs ``scale-digrap[wandb]``)."""

    wandb_project: str = "scale-digrap"
    """Project of the Weights & Biases run."""


@dataclass(kw_only=True)
class Config:
    """Everything a run needs. See the classes of the sections for their keys."""

    run_dir: PathText = "runs/default"
    """Where logs, checkpoints, the resolved configuration and the final model go."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer.name": ("digrap", "ftp", "spd", "l2sp", "adamw"),
    "optimizer.normalization": ("row", "tensor"),
    "optimizer.project_when": ("conflict", "agree"),
    "optimizer.anchor": ("auto", "initial", "zero", "none"),
    "optimizer.anchor_dtype": ("auto", "bfloat16", "float32"),
    "schedule.name": ("cosine", "linear", "constant"),
    "data.mixture_epoch": ("all", "first"),
    "training.precision": ("fp32", "bf16"),
    "training.device": ("auto", "cpu", "cuda"),
    "sharding.engine": ("fsdp", "deepspeed"),
    "checkpoint.final_dtype": ("float32", "bfloat16"),
    "checkpoint.on_error": ("stop", "continue"),
    "checkpoint.on_damage": ("fallback", "refuse"),
}
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")
SUITE_CHOICES: dict[str, tuple[str, ...]] = {
    "group": ("id", "near", "far"),
    "shift": ("none", "vision", "question", "answer", "multimodal", "adversarial", "skill"),
}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides in order, validate.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: such as ``["optimizer.lr=1e-3", "model.freeze=[vision_tower]"]``.

    Raises:
        ConfigError: unreadable file, unknown or mistyped key, wrong type, value out of range.
    """
    return config_from_dict(read_values(path, overrides, Config))


def config_from_dict(values: Mapping[str, Any], *, stored: bool = False) -> Config:
    """Build and validate a :class:`Config` from nested dictionaries.

    Args:
        values: as of a YAML file, or as a run has stored them.
        stored: a run has stored them: interpolations that cannot be resolved any more stay as they are.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    config: Config = read_structured(values, Config, stored=stored)
    validate(config)
    return config


def config_to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that :func:`load_config` reads back; what is secret is masked
    (:func:`scale_digrap.settings.shown`)."""
    return to_yaml(shown(config))


def save_config(config: Config, path: str | Path) -> None:
    """Write :func:`config_to_yaml` to ``path``, for nobody else to read."""
    write_whole(path, config_to_yaml(config), 0o600)


def validate(config: Config) -> None:
    """Check what types alone cannot: choices, ranges, and keys that must agree.

    Raises:
        ConfigError: naming the first key that is wrong.
    """
    for key, choices in CHOICES.items():
        _check_choice(key, _get(config, key), choices)
    for name, suite in config.evaluation.suites.items():
        for key, choices in SUITE_CHOICES.items():
            _check_choice(f"evaluation.suites.{name}.{key}", getattr(suite, key), choices)
        if not suite.shards:
            raise ConfigError(f"evaluation.suites.{name}.shards is empty: name its tar files")
        if (suite.group == "id") != (suite.shift == "none"):
            raise ConfigError(
                f"evaluation.suites.{name}: group id goes with shift none and only with it, got {suite.group} and "
                f"{suite.shift}"
            )

    for key in (
        "optimizer.lr",
        "optimizer.eps",
        "lora.alpha",
    ):
        _check_range(config, key, above=0.0)
    for key in ("training.batch_size", "training.gradient_accumulation", "training.max_skipped_steps", "lora.rank"):
        _check_range(config, key, low=1)
    for key in ("sharding.dp_replicate_size", "evaluation.batch_size", "evaluation.max_new_tokens", "log.every"):
        _check_range(config, key, low=1)
    for key in ("data.workers", "evaluation.workers", "data.retries", "data.timeout_s"):
        _check_range(config, key, low=0)
    for key in ("data.lanes", "data.mixture_block"):
        _check_range(config, key, low=1)
    _check_range(config, "data.store_timeout_s", above=0.0)
    _check_range(config, "data.max_bad_fraction", low=0.0, high=1.0)
    for key, low in (("data.window", 1), ("data.image_size", 1), ("data.max_bad", 0)):
        if _get(config, key) is not None:
            _check_range(config, key, low=low)
    if config.data.cache_gb is not None:
        _check_range(config, "data.cache_gb", above=0.0)
    if config.data.train and config.data.mixture:
        raise ConfigError("data.train and data.mixture are both given: name each data set in one of them")
    for name, source in config.data.mixture.items():
        if not source.shards:
            raise ConfigError(f"data.mixture.{name}.shards is empty: name its tar files")
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ConfigError(f"data.mixture.{name}.weight must be greater than 0, got {source.weight}")
    for key in (
        "checkpoint.every",
        "checkpoint.keep_every",
        "log.layers_every",
        "schedule.warmup_steps",
        "training.seed",
    ):
        _check_range(config, key, low=0)
    _check_range(config, "checkpoint.keep", low=1)
    for key in ("weight_decay", "omega_lr", "omega_max", "gamma_lr"):
        _check_range(config, f"optimizer.{key}", low=OPTION_BOUNDS[key].low)
    _check_range(config, "optimizer.gamma_k", low=OPTION_BOUNDS["k"].low, high=OPTION_BOUNDS["k"].high)
    if config.optimizer.strength is not None:
        _check_range(config, "optimizer.strength", low=OPTION_BOUNDS["strength"].low)
        if config.optimizer.name not in ("spd", "l2sp"):
            raise ConfigError(f"optimizer.strength is of spd and l2sp; optimizer.name is {config.optimizer.name}")
    _check_range(config, "lora.dropout", low=0.0, below=1.0)
    for key in ("schedule.warmup_init_ratio", "schedule.min_lr_ratio"):
        _check_range(config, key, low=0.0, high=1.0)
    for key in ("training.steps", "training.global_batch_size", "model.max_length"):
        if _get(config, key) is not None:
            _check_range(config, key, low=1)
    for key in ("training.sync_check_every", "training.spike_threshold", "training.stall_s"):
        _check_range(config, key, low=0)
    _check_range(config, "training.timeout_s", above=0.0)
    _check_range(config, "training.spike_window", low=10)
    if config.training.global_batch_size is not None and config.training.gradient_accumulation != 1:
        raise ConfigError(
            f"training.global_batch_size={config.training.global_batch_size} and training.gradient_accumulation="
            f"{config.training.gradient_accumulation} are both given: remove one of the two"
        )
    _check_stop(config.training)
    for key in ("training.epochs", "training.clip_norm"):
        if _get(config, key) is not None:
            _check_range(config, key, above=0.0)
    for key in ("optimizer.betas", "optimizer.omega_betas"):
        betas = _get(config, key)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"{key} must be two numbers in [0, 1), got {betas}")

    for key, needed in (("model.prompt", "{question}"), ("model.answer", "{answer}")):
        if needed not in _get(config, key):
            raise ConfigError(f"{key} must contain {needed}, got {_get(config, key)!r}")
    for key in (
        "model.freeze",
        "model.new_layers",
        "lora.targets",
        "lora.train",
        "sharding.wrap",
        "optimizer.no_decay",
    ):
        for pattern in _get(config, key):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{key}: {pattern!r} is not a regular expression: {error}") from None

    if config.lora.enabled and config.model.freeze:
        raise ConfigError(
            "model.freeze has no effect with lora.enabled=true (the base is frozen): remove one of the two"
        )
    if config.lora.enabled and not config.lora.targets:
        raise ConfigError("lora.targets is empty: name the linear modules that get an adapter")
    if config.lora.enabled and config.optimizer.name != "adamw" and config.optimizer.anchor == "initial":
        raise ConfigError(
            "optimizer.anchor=initial anchors LoRA adapters at their random initialisation: use auto or zero"
        )
    problem = zero_problem(config)
    if problem is not None:
        raise ConfigError(problem)
    if not str(config.run_dir).strip():
        raise ConfigError("run_dir is empty: name a folder for logs and checkpoints")


def _check_stop(training: TrainingConfig) -> None:
    if training.stall_s >= training.timeout_s:
        raise ConfigError(
            f"training.stall_s={training.stall_s:g} must be below training.timeout_s={training.timeout_s:g}: the "
            f"timeout ends the ranks before they could write where they hang"
        )
    if training.max_time is not None:
        try:
            seconds(training.max_time)
        except ValueError as error:
            raise ConfigError(f"training.max_time: {error}") from None
    for name in training.stop_signals:
        if name not in STOP_SIGNALS:
            raise ConfigError(
                f"training.stop_signals must be among {', '.join(STOP_SIGNALS)}; got {name!r}"
                f"{suggest(name, STOP_SIGNALS)}"
            )


def validate_for_training(config: Config) -> None:
    """The checks that need a training run to be meant (``--print-config`` of a partial file skips them)."""
    if (config.training.steps is None) == (config.training.epochs is None):
        raise ConfigError(
            f"give exactly one of training.steps and training.epochs, got steps={config.training.steps} and "
            f"epochs={config.training.epochs}"
        )
    if not config.data.train and not config.data.mixture:
        raise ConfigError("data.train is empty: name the training shards, for example data.train=[data/train-*.tar]")
    if config.training.steps is not None and config.schedule.warmup_steps >= config.training.steps:
        raise ConfigError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} leaves nothing of training.steps="
            f"{config.training.steps}: warm up for less"
        )


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}; got {value!r}{suggest(str(value), choices)}")


def _check_range(
    config: Config,
    key: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    value = _get(config, key)
    wanted = []
    ok = math.isfinite(value)
    for bound, text, holds in (
        (low, "at least", lambda b: value >= b),
        (above, "greater than", lambda b: value > b),
        (high, "at most", lambda b: value <= b),
        (below, "less than", lambda b: value < b),
    ):
        if bound is not None:
            wanted.append(f"{text} {bound:g}")
            ok = ok and holds(bound)
    if not ok:
        raise ConfigError(f"{key} must be {' and '.join(wanted)}, got {value}")
