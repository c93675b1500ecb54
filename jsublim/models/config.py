"""The frozen numbers that fix a decoder's architecture, read from a checkpoint's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jsublim.errors import UsageError


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one kind of layer (global or local)."""

    theta: float
    # default; linear; llama3 and yarn, which scale parts of the spectrum differently; longrope (Phi-3), which divides each frequency
    scaling: str = "default"
    factor: float = 1.0  # of linear, llama3 and yarn
    low_freq_factor: float = 0.0  # of llama3 and yarn, as the next one: turns within the original positions
    high_freq_factor: float = 0.0
    divisors: tuple[float, ...] = ()  # of longrope, one per frequency, for rows of up to `original_positions` tokens
    original_positions: int = 0  # of llama3, yarn and longrope: what the model was trained with before
    share: float = 1.0  # of a head's numbers that are turned; the others stay as they are
    amplitude: float = 1.0  # cos and sin are multiplied by it
    in_float32: bool = False  # cos and sin are not rounded to the model's dtype

    def turned(self, head_dim: int) -> int:
        """How many numbers of a head are turned."""
        return int(head_dim * self.share)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest row that these frequencies are for; None is any."""
        return self.original_positions if self.scaling == "longrope" else None


@dataclass(frozen=True)
class Norms:
    """The norms of a model: RMSNorms, or LayerNorms with a bias."""

    eps: float  # added to the mean square
    offset: float = 0.0  # weights are stored around it: Gemma multiplies by 1 + w
    in_float32: bool = False  # weights multiply before the product is rounded to the model's dtype, not after
    centred: bool = False  # LayerNorms: the mean is taken away first, and a bias added last
    before_sublayers: bool = True  # what attention and MLP read is normed
    after_sublayers: bool = False  # so is what they put out, before the residual sum
    on_heads: bool = False  # queries and keys are normed too, head by head
    on_projections: bool = False  # or all heads of a token at once


@dataclass(frozen=True)
class Biases:
    """Which projections have a bias: those of queries, keys and values; attention's output; the MLP's."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


@dataclass(frozen=True)
class Scaling:
    """Numbers that some families multiply by."""

    embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size), rounded to the weights' dtype
    query: float = 0.0  # products of queries and keys are multiplied by it; 0 is head_dim ** -0.5
    softcap: float | None = None  # logits z become softcap * tanh(z / softcap)
    attention_softcap: float | None = None  # so do the scaled products of queries and keys
    rounded: bool = False  # logits are rounded to the weights' dtype, as torch leaves them (docs/recipes.md, quirk 17)


@dataclass(frozen=True)
class MLPKind:
    """The second sublayer."""

    activation: str = "silu"  # silu, gelu or gelu_tanh
    gated: bool = True  # the activation of one projection is multiplied by another one
    parallel: bool = False  # it reads the residual stream as attention does, not after attention has added to it


@dataclass(frozen=True)
class Local:
    """Layers whose tokens see only the last `window` tokens."""

    layers: tuple[bool, ...] = ()  # per layer, whether it is one of these; empty: none is
    window: int = 0
    rope: Rope | None = None  # their rotary embedding; None is that of the other layers


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only transformer: everything that a family may differ in, so that one module serves them all."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norms: Norms
    rope: Rope
    tied: bool  # the head is the embedding
    mlp: MLPKind = MLPKind()
    biases: Biases = Biases()
    scales: Scaling = Scaling()
    local: Local = Local()

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Per layer, whether it sees the last `window` tokens only."""
        return self.local.layers or (False,) * self.num_layers

    @property
    def ropes(self) -> tuple[Rope, Rope]:
        """The rotary embeddings of global and of local layers."""
        return self.rope, self.local.rope or self.rope

    def ending_at(self, layer: int) -> ModelConfig:
        """The logit lens: the model that ends after `layer`, then the final norm and the head, with the same parameters and adapters (whatever
        reads a stack of layers takes its first `num_layers`). A layer that it hasn't is a UsageError."""
        if not 0 <= layer < self.num_layers:
            raise UsageError(f"layer: {layer} given, but the model has layers 0 to {self.num_layers - 1}")
        return replace(self, num_layers=layer + 1, local=replace(self.local, layers=self.local.layers[: layer + 1]))

    @property
    def softmax_scale(self) -> float:
        """The factor of the products of queries and keys."""
        return self.scales.query or self.head_dim**-0.5


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each projection that a block has."""
    D, F, h = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * h, config.num_kv_heads * h
    gate = {"gate": (D, F)} if config.mlp.gated else {}
    return {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D), **gate, "up": (D, F), "down": (F, D)}


def layer_parameters(config: ModelConfig) -> int:
    """Weights of one layer's projections."""
    return sum(inputs * outputs for inputs, outputs in projection_shapes(config).values())
