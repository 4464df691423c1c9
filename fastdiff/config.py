"""One frozen model per stage: every option, its default, its meaning and its range.

The command line takes names, defaults and help from these fields, so each stands once. A configuration
file (YAML) has one section per stage with the same names; an unknown key is an error.
"""

import difflib
import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fastdiff.errors import OptionError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StoreDtype = Literal["float32", "bfloat16", "float16"]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _split(value: Any) -> Any:
    """A comma-separated string, as the command line gives it, in parts."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_split)]
Fractions = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(_split)]
# a default that depends on other fields: the template shows it as a comment
_DERIVED: dict[str, Any] = {"derived": True}
# whether `run` takes a stage at all: no option of the stage's own command, and nothing that its result depends on
_OF_RUN: dict[str, Any] = {"of_run": True}


class StageConfig(BaseModel):
    """What all stages share: frozen; an unknown key and a number that is not finite are errors."""

    # defaults are validated for their type: a stage made with 10 is not the one made with 10.0
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


Stage = TypeVar("Stage", bound=StageConfig)


class ExtractConfig(StageConfig):
    """Which activations to take, from which models, over which text."""

    base: str = Field(min_length=1, description="Base model: a path or a Hugging Face id.")
    tuned: str = Field(min_length=1, description="Tuned model: a path or a Hugging Face id.")
    # YAML reads an unquoted 13 or 0.5 as a number
    layer: str = Field(
        "0.5",
        coerce_numbers_to_str=True,
        description="Layer: a 0-based index (13), or a fraction with a point (0.5).",
    )
    hook: Literal["resid_post", "mlp_out", "attn_out"] = Field(
        "resid_post",
        description="The residual stream after the layer, or what its MLP or attention adds to it.",
    )
    dataset: list[str] = Field(
        min_length=1,
        description="Texts: a .jsonl, .txt or .parquet file, or a Hugging Face data set id. May be repeated.",
    )
    split: str = Field("train", description="Split of a Hugging Face data set.")
    text_field: str = Field("text", description="Field that holds the text.")
    messages_field: str | None = Field(
        None, description="Field that holds chat messages (role, content); used instead of the text field."
    )
    answer_field: str | None = Field(
        None, description="Field that holds the answer; the text field is then the prompt."
    )
    category_field: str | None = Field(
        None, description="Field that holds a document's category, kept as its source label."
    )
    ctx_len: PositiveInt = Field(1024, description="Longest sequence, in tokens; longer documents are cut.")
    max_tokens: PositiveInt = Field(1_000_000, description="Stop after this many stored tokens.")
    batch_size: PositiveInt = Field(8, description="Sequences in one forward pass.")
    skip_first: NonNegativeInt = Field(0, description="Positions at the start that are run but not stored.")
    keep_bos: bool = Field(False, description="Store the BOS position too; it is left out of use all the same.")
    max_norm: float = Field(
        3.0,
        ge=0,
        json_schema_extra=_DERIVED,
        description="Leave rows out of use (not out of the store) whose norm is over so many times the median, and "
        "position 0 without BOS; unless given, 6 for mlp_out and attn_out. 0: none.",
    )
    dtype: Dtype = Field(
        "auto",
        description="Precision of the forward pass, one for all models; auto is bfloat16 on CUDA, else the widest that "
        "one of them was saved in.",
    )
    store_dtype: StoreDtype = Field("bfloat16", description="Precision on disk.")
    shard_rows: PositiveInt = Field(1_000_000, description="Rows in one shard file.")
    device: str = Field("auto", description="cuda, cuda:1, cpu or auto.")
    seed: Seed = Field(0, description="Order of the documents.")

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.answer_field and self.messages_field:
            raise ValueError("--answer-field goes with --text-field; with --messages-field, answers are messages")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fit_max_norm(cls, values: Any) -> Any:
        # what one branch adds varies more from row to row than the stream it is added to
        if isinstance(values, dict) and values.get("hook") in ("mlp_out", "attn_out"):
            values = {"max_norm": 6.0, **values}
        return values


class TrainConfig(StageConfig):
    """The crosscoder and how it is trained. Defaults follow Minder et al. 2025, arXiv:2504.02922."""

    # how often training looks, writes and reports: no weight depends on it, so it may change when a run is continued
    WATCHING: ClassVar[frozenset[str]] = frozenset(
        {"check_reads", "checkpoint_every", "keep_checkpoints", "log_every", "eval_every", "eval_tokens", "track"}
    )

    inputs: str = Field(
        "all",
        coerce_numbers_to_str=True,
        description="What is reconstructed: all models, some by number (0 or 0,2), or the difference tuned - base.",
    )
    activation: Literal["batchtopk", "topk", "jumprelu", "relu"] = Field("batchtopk", description="Which latents fire.")
    dict_size: PositiveInt = Field(32768, description="Dictionary size F: number of latents.")
    k: PositiveInt = Field(100, description="Active latents per token (for jumprelu the L0 that is aimed at).")
    k_start: PositiveInt | None = Field(None, description="k at the first step; falls linearly to k.")
    k_anneal_steps: NonNegativeInt = Field(0, description="Steps over which k falls from k-start to k.")
    steps: PositiveInt = Field(20_000, description="Optimizer steps.")
    batch_size: PositiveInt = Field(4096, description="Tokens in one step.")
    lr: float = Field(1e-4, gt=0, description="Learning rate of Adam.")
    warmup_steps: NonNegativeInt = Field(
        1000,
        json_schema_extra=_DERIVED,
        description="Steps over which the learning rate rises linearly; unless given, at most a tenth.",
    )
    decay_steps: NonNegativeInt = Field(0, description="Last steps, over which it falls to 0.")
    decay: Literal["linear", "cosine"] = Field("linear", description="Shape of that fall.")
    micro_batch: PositiveInt | None = Field(
        None,
        description="Tokens in memory at a time, a divisor of batch-size; unless given, all of the batch. BatchTopK "
        "selects within them.",
    )
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 turns clipping off.")
    clip_mode: Literal["exact", "previous"] = Field(
        "exact", description="Clip by this step's gradient norm, or by the last step's, which costs nothing on a GPU."
    )
    loss: Literal["l2norm", "mse"] = Field(
        "l2norm",
        description="Reconstruction loss per model: mean L2 norm of the error, or mean squared error.",
    )
    auxk_coef: float = Field(1 / 32, ge=0, description="Weight of the AuxK loss (TopK and BatchTopK).")
    dead_tokens: PositiveInt = Field(
        10_000_000, description="A latent that has not fired for this many tokens is dead."
    )
    code_norm: Literal["crosscoder", "sae", "none"] = Field(
        "crosscoder",
        description="What an activation is multiplied by where latents are ranked or penalised: the sum of its decoder "
        "norms, the norm of all decoders together, or nothing.",
    )
    multi_topk_coef: float = Field(
        0.0, ge=0, description="Weight of the reconstruction by 4k latents (TopK, BatchTopK); 0.125 where it is used."
    )
    matryoshka: Fractions = Field(
        (), description="Shares of the dictionary whose first latents must reconstruct alone too, such as 0.125,0.5."
    )
    delta_coef: float = Field(0.0, ge=0, description="Weight of the error of each model's difference to the first.")
    shared_latents: NonNegativeInt = Field(
        0, description="First latents, whose decoders are the same for all models (designated shared)."
    )
    shared_penalty: float = Field(
        0.1, gt=0, le=1, description="Penalty of those relative to the others' (relu; jumprelu with l0 or tanh)."
    )
    exclusive: float = Field(
        0.0, ge=0, lt=0.5, description="Share of the dictionary that only one model reads and writes, for each model."
    )
    l1_coef: float = Field(0.05, ge=0, description="Weight of the L1 penalty (relu).")
    sparsity: Literal["target", "l0", "tanh"] = Field(
        "target", description="Penalty of jumprelu: L0's distance from k, L0, or tanh of the activations."
    )
    l0_coef: float = Field(
        2.0,
        ge=0,
        description="Weight of that penalty (jumprelu); with target relative to the loss of reconstructing nothing.",
    )
    tanh_scale: float = Field(4.0, gt=0, description="Steepness of the tanh penalty (jumprelu).")
    preact_coef: float = Field(
        0.0, ge=0, description="Weight of what pre-activations lack to the threshold (jumprelu); costs dense products."
    )
    bandwidth: float = Field(0.3, gt=0, description="Width of the straight-through window (jumprelu).")
    sparsity_warmup_steps: NonNegativeInt = Field(
        1000,
        json_schema_extra=_DERIVED,
        description="Steps over which the penalty rises (relu, jumprelu); same rule as warmup-steps.",
    )
    init: Literal["independent", "shared"] = Field(
        "independent", description="Initial directions: each model its own draw, or one draw for all."
    )
    normalize: Literal["rms", "none"] = Field(
        "rms",
        description="Centre each model's input and scale its variance to d_model, or leave it as it is.",
    )
    shuffle: Literal["block", "exact"] = Field(
        "block",
        description="Order of the rows: blocks of 32 mixed in a pool, as fast as the disk; or every row on its own.",
    )
    pool_gb: float = Field(
        0,
        ge=0,
        description="Most memory of that pool; 0 is what a good shuffle needs, at most a quarter of the memory.",
    )
    check_reads: bool = Field(False, description="Check every row against the store's checksums while training.")
    holdout: float = Field(0.01, ge=0, lt=1, description="Last share of documents, kept for evaluation.")
    threshold_decay: float = Field(
        0.999, ge=0, lt=1, description="Memory of the running mean that gives the inference threshold."
    )
    backend: Literal["auto", "triton", "torch", "dense"] = Field(
        "auto",
        description="Triton kernels, sparse products in torch, or dense ones; auto is triton on CUDA, else torch.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="What the products of batchtopk and topk multiply; auto is bfloat16 on CUDA, else float32. "
        "Weights are float32.",
    )
    moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="Adam's moments; bfloat16 (CUDA only) halves their memory."
    )
    calibrate_tokens: NonNegativeInt = Field(
        100_000,
        description="Training tokens on which the inference threshold is set at the end so that k latents fire "
        "(batchtopk); 0 leaves it at the running mean.",
    )
    checkpoint_every: PositiveInt = Field(1000, description="Steps between checkpoints.")
    keep_checkpoints: PositiveInt = Field(2, description="How many of the newest stay; with several seeds at least 2.")
    eval_every: NonNegativeInt = Field(0, description="Steps between evaluations on held-out rows; 0: only at the end.")
    eval_tokens: PositiveInt = Field(100_000, description="Held-out rows that one of those looks at.")
    log_every: PositiveInt = Field(50, description="Steps between lines in events.jsonl.")
    track: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        [],
        description="Where figures go besides events.jsonl, on this machine unless WANDB_MODE=online. May be repeated.",
    )
    seed: Seed = Field(0, description="Initialisation of the weights.")
    seeds: Seeds = Field((), description="Several seeds at once, over one pass of the data, such as 0,1,2.")
    data_seed: Seed = Field(0, description="Order of the data.")
    threads: NonNegativeInt = Field(0, description="CPU threads; 0 is what torch chooses.")
    device: str = Field("auto", description="cuda, cuda:1, cpu or auto.")

    @model_validator(mode="before")
    @classmethod
    def _fit_warmup(cls, values: Any) -> Any:
        # a short run with the default of 1000 would never leave its warm-up
        steps = values.get("steps") if isinstance(values, dict) else None
        decay = values.get("decay_steps", 0) if isinstance(values, dict) else None
        if isinstance(steps, int) and isinstance(decay, int):
            fitting = max(0, min(1000, steps // 10, steps - decay))
            values = {"warmup_steps": fitting, "sparsity_warmup_steps": fitting, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not set(self.inputs) <= set("0123456789,") and self.inputs not in ("all", "difference"):
            raise ValueError(f"inputs must be all, difference or numbers of models such as 0,2, got {self.inputs!r}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {','.join(map(str, self.seeds))}")
        if list(self.matryoshka) != sorted(set(self.matryoshka)):
            raise ValueError(f"matryoshka must rise, got {','.join(map(str, self.matryoshka))}")
        # the whole dictionary is the last of them
        ends = [*self.prefix_ends(), self.dict_size]
        if len(set(ends)) < len(ends):
            raise ValueError(f"matryoshka must give different numbers of latents, got {','.join(map(str, ends))}")
        if self.shared_latents > self.dict_size:
            raise ValueError(f"shared_latents must not exceed dict_size={self.dict_size}, got {self.shared_latents}")
        if self.k > self.dict_size:
            raise ValueError(f"k must lie in [1, dict_size={self.dict_size}], got {self.k}")
        if self.k_start is not None and not self.k <= self.k_start <= self.dict_size:
            raise ValueError(f"k_start must lie in [k={self.k}, dict_size={self.dict_size}], got {self.k_start}")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch={self.micro_batch} must divide batch_size={self.batch_size}")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps + decay_steps must not exceed steps={self.steps}, "
                f"got {self.warmup_steps} + {self.decay_steps}"
            )
        return self

    def of_seed(self, seed: int) -> Self:
        """The configuration of a solo run of one of `seeds`."""
        return self.model_copy(update={"seed": seed, "seeds": ()})

    def prefix_ends(self) -> list[int]:
        """How many latents each of the `matryoshka` prefixes has."""
        return [max(1, round(share * self.dict_size)) for share in self.matryoshka]

    def identity(self) -> dict[str, Any]:
        """What the weights depend on, as JSON values."""
        return self.model_dump(mode="json", exclude={*self.WATCHING, "seeds"})


class AttributeConfig(StageConfig):
    """How much of the change in behaviour runs through which latent."""

    enabled: bool = Field(
        True, json_schema_extra=_OF_RUN, description="Whether `fastdiff run` does this; it runs the models again."
    )
    documents: PositiveInt = Field(40, description="Documents of each category whose nats are traced to latents.")
    behaviour_documents: PositiveInt = Field(
        200, description="Documents of each category on which both models are scored; at least as many as above."
    )
    minutes: float = Field(
        10,
        ge=0,
        description="If tracing is predicted to take longer, 12 documents of each category are traced. 0: never fewer.",
    )
    tau: float = Field(0.05, gt=0, description="Smallest change that counts, in nats per token.")
    tuned: str = Field(
        "1",
        coerce_numbers_to_str=True,
        description="Which model is compared with model 0 where there are more than two: its number or name.",
    )
    batch_tokens: PositiveInt = Field(4096, description="Positions in one pass, padding included.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the passes; auto is bfloat16 on CUDA, else float32. Sums are finer."
    )
    device: str = Field("auto", description="cuda, cuda:1, cpu or auto.")


class AnalyzeConfig(StageConfig):
    """How latents are measured and shown."""

    train_seed: Seed = Field(0, description="Which crosscoder of the run: the seed it was trained with.")
    max_tokens: NonNegativeInt = Field(0, description="Tokens to read; 0 is the whole store.")
    batch_size: PositiveInt = Field(4096, description="Tokens in one pass through the encoder.")
    examples: NonNegativeInt = Field(8, description="Maximum-activating examples per latent.")
    context: PositiveInt = Field(24, description="Tokens shown on each side of a peak.")
    cards: PositiveInt = Field(400, description="Latents of one model, and shared ones, that get examples.")
    nu_error_max: float = Field(0.2, gt=0, description="Specific: |nu_error| is below this.")
    nu_reconstruction_max: float = Field(0.5, gt=0, description="Specific: |nu_reconstruction| is below this.")
    stable_cosine: float = Field(
        0.7, gt=0, le=1, description="Stable: a latent of another seed has a decoder cosine of at least this."
    )
    stable_coactivation: float = Field(
        0.5, gt=0, le=1, description="Stable: and their activations a cosine of at least this."
    )
    all_seeds: bool = Field(
        True,
        description="Also count the latents that one model alone has in the run's other crosscoders, for the table "
        "over all seeds; a pass over the store for each.",
    )
    splice: bool = Field(
        False, description="Also run the models on reconstructions: cross entropy, KL and loss recovered."
    )
    splice_tokens: PositiveInt = Field(20_000, description="Held-out tokens to do that on.")
    device: str = Field("auto", description="cuda, cuda:1, cpu or auto.")


class AnnotateConfig(StageConfig):
    """Who labels the latents."""

    annotator: Literal["baseline"] = Field(
        "baseline",
        description="baseline: offline, by where a latent fires. It reads the data set's categories.",
    )
    min_count: PositiveInt = Field(10, description="A latent that fires less often than this is not labelled.")
    min_lift: float = Field(
        2.0,
        gt=1,
        description="Mean activation, and peaks, in its category over those in any other, at least; "
        "else no one category.",
    )


class CompareConfig(StageConfig):
    """How changes are decided and category differences are tested."""

    alpha: float = Field(0.05, gt=0, lt=1, description="False discovery rate: a category is significant if q < this.")
    confidence: float = Field(0.95, gt=0, le=0.9999, description="Coverage of the intervals.")
    tau: float = Field(0.05, gt=0, description="Smallest change that counts as one, in nats per scored token.")
    # YAML reads a key called null as no key at all
    null_run: str | None = Field(
        None,
        json_schema_extra={"flag": "--null"},
        description="Run directory of two models that differ by nothing that counts, such as base trained further on "
        "its own data; a change must exceed what that run shows.",
    )


class RunConfig(StageConfig):
    """All stages, as `fastdiff run -c run.yaml` takes them."""

    extract: ExtractConfig
    train: TrainConfig = TrainConfig()
    attribute: AttributeConfig = AttributeConfig()
    analyze: AnalyzeConfig = AnalyzeConfig()
    annotate: AnnotateConfig = AnnotateConfig()
    compare: CompareConfig = CompareConfig()


def flag(model: type[StageConfig], name: str) -> str:
    """The command line's option for a field."""
    extra = model.model_fields[name].json_schema_extra if name in model.model_fields else None
    return str(extra["flag"]) if isinstance(extra, dict) and "flag" in extra else "--" + name.replace("_", "-")


def validated(
    model: type[Stage], values: dict[str, Any], called: Callable[[tuple[str, ...]], str] | None = None
) -> Stage:
    """Build a configuration.

    Args:
        model: Which.
        values: Its fields.
        called: What the user calls the field at a path such as ("train", "k"); an option unless given.

    Raises:
        OptionError: A value is out of range, of another type, missing, or of an unknown name.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            path = tuple(str(part) for part in item["loc"])
            if not path or (isinstance(item["input"], dict) and item["type"] == "value_error"):
                # a check of several fields names them itself
                problems.append(item["msg"].removeprefix("Value error, "))
                continue
            field = next((i for i, part in enumerate(path) if part.isdecimal()), len(path))
            name = called(path[:field]) if called else _option_of(model, path[:field])
            problems.append(f"{name}{_problem(model, path, item, 'option' if name.startswith('--') else 'field')}")
        raise OptionError("; ".join(problems)) from error


def _option_of(model: type[StageConfig], path: tuple[str, ...]) -> str:
    return flag(model, path[0]) if len(path) == 1 else f"--set {'.'.join(path)}"


def _problem(model: type[StageConfig], path: tuple[str, ...], item: Any, what: str) -> str:
    """What is wrong with one field, to follow its name; `what` is how it was given."""
    kind, limits, got = item["type"], item.get("ctx", {}), item["input"]
    if kind == "missing":
        return " is required"
    if kind == "extra_forbidden":
        known: Any = model
        for part in path[:-1]:
            known = known.model_fields[part].annotation
        near = difflib.get_close_matches(path[-1], known.model_fields, n=1)
        return f": no such {what}" + (f"; did you mean {near[0]}?" if near else "")
    if kind in ("string_too_short", "too_short"):
        return " is empty; give a value"
    says = {
        "greater_than": "must be more than {gt:g}",
        "greater_than_equal": "must be at least {ge:g}",
        "less_than": "must be less than {lt:g}",
        "less_than_equal": "must be at most {le:g}",
        "literal_error": "must be {expected}",
        "finite_number": "must be a finite number",
        "int_parsing": "must be a whole number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_parsing": "must be a number",
        "float_type": "must be a number",
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "list_type": "must be a list",
        "model_type": "must hold KEY: VALUE lines",
        "invalid_key": "a field's name must be text (the field for --null is null_run)",
    }.get(kind)
    message = says.format(**limits) if says else item["msg"].removeprefix("Value error, ")
    # a whole section is no help in one line
    return f": {message}" + ("" if isinstance(got, dict) else f" (got {got!r})")


def template(model: type[StageConfig], indent: str = "") -> str:
    """A YAML file with every field of a configuration: its meaning as a comment, its default as value."""
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, StageConfig):
            lines.append(f"{indent}{name}:\n{template(field.annotation, indent + '  ')}")
            continue
        lines.append(f"{indent}# {field.description}\n")
        if field.is_required():
            value = "[]" if str(field.annotation).startswith("list") else '""'
        else:
            value = json.dumps(field.default)
        extra = field.json_schema_extra
        derived = isinstance(extra, dict) and extra.get("derived")
        lines.append(f"{indent}{'# ' if derived else ''}{name}: {value}\n")
    return "".join(lines)
