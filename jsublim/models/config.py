"""What a decoder is: the frozen numbers that fix its architecture, read from a checkpoint's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one kind of layer (global or local).

    Attributes:
      scaling: "default", "linear", "llama3" (which scales parts of the spectrum differently, as Llama 3.1 does) or
        "longrope" (which divides each frequency by a number of its own, as Phi-3 does).
      factor: of linear and llama3.
      low_freq_factor, high_freq_factor: of llama3.
      divisors: of longrope, one per frequency: those for rows of up to `original_positions` tokens.
      original_positions: of llama3 and longrope, what the model was trained with before.
      share: of a head's numbers that are turned; the others stay as they are.
      amplitude: cos and sin are multiplied by it.
      in_float32: cos and sin are not rounded to the model's dtype.
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    divisors: tuple[float, ...] = ()
    original_positions: int = 0
    share: float = 1.0
    amplitude: float = 1.0
    in_float32: bool = False

    def turned(self, head_dim: int) -> int:
        """How many numbers of a head are turned."""
        return int(head_dim * self.share)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest row that these frequencies are for; None is any."""
        return self.original_positions if self.scaling == "longrope" else None


@dataclass(frozen=True)
class Norms:
    """The norms of a model: RMSNorms, or LayerNorms with a bias.

    Attributes:
      eps: added to the mean square.
      offset: weights are stored around it: Gemma multiplies by 1 + w.
      in_float32: weights multiply before the product is rounded to the model's dtype, not after.
      centred: LayerNorms: the mean is taken away first, and a bias added last.
      before_sublayers: what attention and MLP read is normed.
      after_sublayers: so is what they put out, before the residual sum.
      on_heads: queries and keys are normed too, head by head.
      on_projections: or all heads of a token at once.
    """

    eps: float
    offset: float = 0.0
    in_float32: bool = False
    centred: bool = False
    before_sublayers: bool = True
    after_sublayers: bool = False
    on_heads: bool = False
    on_projections: bool = False


@dataclass(frozen=True)
class Biases:
    """Which projections have a bias: those of queries, keys and values; attention's output; the MLP's."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


@dataclass(frozen=True)
class Scales:
    """Numbers that some families multiply by.

    Attributes:
      embedding: embeddings are multiplied by sqrt(hidden_size), rounded to the weights' dtype.
      query: products of queries and keys are multiplied by it; 0 is head_dim ** -0.5.
      softcap: logits z become softcap * tanh(z / softcap); None leaves them.
      attention_softcap: so do the scaled products of queries and keys.
      rounded: logits are rounded to the weights' dtype, as torch leaves them (docs/recipes.md, quirk 17).
    """

    embedding: bool = False
    query: float = 0.0
    softcap: float | None = None
    attention_softcap: float | None = None
    rounded: bool = False


@dataclass(frozen=True)
class MLPKind:
    """What the second sublayer computes.

    Attributes:
      activation: "silu", "gelu" or "gelu_tanh".
      gated: the activation of one projection is multiplied by another one.
      parallel: it reads the residual stream as attention does, not after attention has added to it.
    """

    activation: str = "silu"
    gated: bool = True
    parallel: bool = False


@dataclass(frozen=True)
class Local:
    """Layers whose tokens see only the last `window` tokens.

    Attributes:
      layers: per layer, whether it is one of these; empty: none is.
      rope: their rotary embedding; None is that of the other layers.
    """

    layers: tuple[bool, ...] = ()
    window: int = 0
    rope: Rope | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only transformer.

    Everything that a family may differ in is a field here, so that one module serves them all.
    """

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
    scales: Scales = Scales()
    local: Local = Local()

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Per layer, whether it sees the last `window` tokens only."""
        return self.local.layers or (False,) * self.num_layers

    @property
    def ropes(self) -> tuple[Rope, Rope]:
        """The rotary embeddings of global and of local layers."""
        return self.rope, self.local.rope or self.rope

    @property
    def softmax_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
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
