"""The sections `adapter` and `losses`: experts, routers, and the losses that act on them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dsmoelora.config.adapter_options import (
    ROUTERS,
    ExpertName,
    MixerInit,
    Pooling,
    RouterName,
    RouterStart,
    Style,
    settle_options,
)
from dsmoelora.config.checks import expanded, require, require_known, require_positive, require_unset
from dsmoelora.config.freeze import Role, check_freeze
from dsmoelora.config.style import check_style

InitName = Literal["kaiming", "gaussian", "svd", "gradient", "loftq"]
SpreadName = Literal["joint", "per_expert"]


@dataclass
class AdapterConfig:
    """A mixture of low-rank experts on every chosen linear layer.

    Args:
        r: rank R of one expert
        lora_alpha: numerator of the scale `s = alpha / R`
        lora_dropout: dropout probability on the input of the experts (the router sees the input undropped)
        use_rslora: scale by `alpha / sqrt(R)` instead (Kalajdzievski 2023)
        target_modules: suffixes of module names, or `all-linear` (every linear layer but the output head): the layers
            with `num_experts` experts and a router
        lora_modules: suffixes of the names of other layers, which get one such expert and no router (plain LoRA, where
            the expert is `lora`)
        style: `per_linear` gives each of the target modules a router, `ffn_block` each feed-forward block one, which
            reads the block's input and serves all target modules in it (MixLoRA); with `decoder_layer` each decoder
            layer has one, for which the target modules in it are the experts, with one expert each (MiLoRA)
        num_experts: E, the experts of one layer; with style `decoder_layer` the target modules of a decoder layer
        shared_experts: more experts of the same kind in each layer with a router, which every token uses with gate 1
        top_k: K, the experts that a token uses, for routers that select a fixed number (softmax_topk, noisy_topk,
            sigmoid_bias, prompt); `null` means half of the experts
        top_k_warmup: of these routers: optimizer steps over which the experts that a token uses in training fall evenly
            from all E to `top_k`; `null` means 0. Evaluations, answers and exports use `top_k`
        gate_power: power of the gate in the gradients of the factors: 1 is the chain rule, 1/2 the rescaling of
            Sun et al.'s released code, 0 their theory. Other than 1, the optimizer does not see the gradient of the
            loss, and `grad_norm` is not its norm
        gate_power_scope: `factors` keeps the input's gradient exact for every `gate_power`; `factors_and_input`
            sends the rescaled gradient down to the input too, as Sun et al.'s released code does (parity checks only)
        expert: kind of expert: two factors (`lora`), two with a mixer between them (`moslora`), or two and the lengths
            of the weight's rows (`dora`)
        mixer_init: of expert `moslora`: how the mixer starts; `null` means `kaiming`
        router: kind of router: the `top_k` best experts (`softmax_topk`), all of them (`softmax`), the best after noise
            (`noisy_topk`), the fewest that reach `top_p` (`top_p`), those above a learned threshold (`threshold`), the
            best after a bias that balances them (`sigmoid_bias`), the best for the whole prompt (`prompt`), the same
            trained gates for every token (`constant`), or the best by the experts' strongest directions, without
            training (`arrow`)
        top_p: of router `top_p`: probability that the chosen experts reach together; `null` means 0.8
        bias_rate: of router `sigmoid_bias`: how far a bias moves in a step; `null` means 0.001
        router_start: of router `constant`: gates are a softmax that starts at 1/E (`softmax`), or free numbers from 1/E
            (`mean`) or from 1 (`sum`) on; `null` means `mean`, or `softmax` with init `svd`
        router_temperature: of router `arrow`: divides the similarities; `null` means 1
        pooling: of router `prompt`: what it sees of a prompt, the mean of its states (`mean`), the last of them
            (`last`), or their mean weighed by a learned softmax (`attention`); `null` means `mean`
        init: what the factors start from; `b` starts at 0 and `a` at random: uniform in +-1/sqrt(in-features)
            (`kaiming`), or normal with standard deviation 1/R (`gaussian`). With `svd` both start from singular vectors
            of the base weight, which is shifted to make up for it (PiSSA; with more than one expert GOAT's segments).
            With `gradient` `a` starts from the gradient of the first training rows and `b` at 0. With `loftq` both
            start from what `model.quantize` has lost of the weight
        init_spread: of init `gradient`: whether the directions of all experts of a layer are orthogonal to each other
            (`joint`), or those of each expert (`per_expert`)
        init_samples: of init `gradient`: the training rows whose gradient is taken, those that training begins with
        loftq_iterations: of init `loftq`: how often the weight is packed anew, without what experts start from, and
            these are found anew
        experts_from: folders of adapters, ours or PEFT's LoRA, as which the experts start, in this order. They decide
            `num_experts`, `r`, `lora_alpha` and the layers where these are not given, and may not be contradicted
        split_ranks: each rank of the adapters in `experts_from` is an expert of rank 1
        freeze: roles that stay as they start in all layers, some of `a`, `b`, `m`, `magnitude`, `router`: they cost no
            gradient and no moments, and are in checkpoints and adapter folders all the same
        seed: what the initial values derive from, together with layer name and expert; `run.seed` in a recipe
    """

    r: int = 4
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    lora_modules: list[str] = field(default_factory=list)
    style: Style = "per_linear"
    num_experts: int = 20
    shared_experts: int = 0
    top_k: int | None = None
    top_k_warmup: int | None = None
    gate_power: float = 1.0
    gate_power_scope: Literal["factors", "factors_and_input"] = "factors"
    expert: ExpertName = "lora"
    mixer_init: MixerInit | None = None
    router: RouterName = "softmax_topk"
    top_p: float | None = None
    bias_rate: float | None = None
    router_start: RouterStart | None = None
    router_temperature: float | None = None
    pooling: Pooling | None = None
    init: InitName = "kaiming"
    init_spread: SpreadName = "joint"
    init_samples: int = 16
    loftq_iterations: int = 3
    experts_from: list[str] = field(default_factory=list)
    split_ranks: bool = False
    freeze: list[Role] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        require_known("adapter", self)
        require_positive("adapter", self, "r", "num_experts", "init_samples", "loftq_iterations")
        settle_options(self)
        require(
            0.0 <= self.lora_dropout < 1.0,
            "adapter.lora_dropout",
            self.lora_dropout,
            "at least 0 and below 1",
            "0 switches dropout off.",
        )
        require(self.lora_alpha > 0, "adapter.lora_alpha", self.lora_alpha, "above 0", "Common values: R to 4 R.")
        require(
            self.gate_power >= 0, "adapter.gate_power", self.gate_power, "0 or more", "Use 1 (chain rule), 0.5 or 0."
        )
        require(
            not self.shifts_base or self.expert == "lora",
            "adapter.init",
            self.init,
            f"kaiming, gaussian or gradient with adapter.expert = {self.expert}",
            "Only experts of two factors and nothing else (lora) can start as a part of the base weight.",
        )
        self._check_shared()
        if self.init != "gradient":
            require_unset("adapter", self, f"where adapter.init is {self.init}", "init_spread", "init_samples")
        if self.init != "loftq":
            require_unset("adapter", self, f"where adapter.init is {self.init}", "loftq_iterations")
        self.experts_from = [expanded("adapter.experts_from", path) for path in self.experts_from]
        if not self.experts_from:
            require_unset("adapter", self, "where adapter.experts_from is empty", "split_ranks")
        else:
            require(not (self.split_ranks and self.expert == "moslora"), "adapter.expert", self.expert,
                    "lora with adapter.split_ranks: one number is no mixer", "Mixers are folded into b.")  # fmt: skip
            remedy = "Drop it: the experts start from the folders."
            is_random = self.init in ("kaiming", "gaussian")
            require(is_random, "adapter.init", self.init, "kaiming or gaussian with adapter.experts_from", remedy)
            shared, all_have_gates = self.shared_experts, "All that are given have a gate."
            require(not shared, "adapter.shared_experts", shared, "0 with adapter.experts_from", all_have_gates)
            require(self.expert != "dora", "adapter.expert", self.expert, "lora or moslora with adapter.experts_from",
                    "Lengths of rows are in none of the adapters that can be given.")  # fmt: skip
        check_freeze(self)
        check_style(self)
        sum_to_1 = self.router_start in (None, "softmax")
        require(not self.shifts_base or sum_to_1, "adapter.router_start", self.router_start, "softmax where "
                f"adapter.init is {self.init}, whose base is right for gates that sum to 1", "Drop it.")  # fmt: skip
        if self.target_modules == ["all-linear"]:
            self.target_modules = "all-linear"
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            self.target_modules = [self.target_modules]
        ok = self.target_modules == "all-linear" or (self.target_modules and all(self.target_modules))
        remedy = "Example: [q_proj, v_proj]."
        require(bool(ok), "adapter.target_modules", self.target_modules, "a list of names or `all-linear`", remedy)
        if self.num_experts == 1:  # its gate is 1, and so is any power of it
            require_unset("adapter", self, "where adapter.num_experts is 1", "gate_power")
        if self.gate_power == 1:
            require_unset("adapter", self, "where adapter.gate_power is 1", "gate_power_scope")
        ok, allowed = self.num_experts > 1 or not self.lora_modules, "2 or more where adapter.lora_modules names layers"
        remedy = "Name them in adapter.target_modules: with one expert all of these are plain LoRA."
        require(ok, "adapter.num_experts", 1, allowed, remedy)

    def _check_shared(self) -> None:
        """Whether experts with gate 1 can stand beside the routed ones."""
        count, key = self.shared_experts, "adapter.shared_experts"
        require(count >= 0, key, count, "0 or more", "The usual value is 1.")
        if not count:
            return
        shifted = f"with adapter.init = {self.init}, whose shift of the base goes by gates of 1 / num_experts"
        reasons = {
            "where adapter.num_experts is 1: that one has gate 1 already": self.num_experts == 1,
            "with adapter.expert = dora: no row of a weight has the lengths of two at once": self.expert == "dora",
            shifted: self.shifts_base,
        }
        for reason, holds in reasons.items():
            require(not holds, key, count, f"0 {reason}", "Drop it, or change the other key.")

    def plain(self) -> AdapterConfig:
        """The same with one expert and no router."""
        routing: dict[str, Any] = {"router": "softmax_topk", "top_k": 1, "top_k_warmup": None}
        routing |= {"top_p": None, "bias_rate": None, "router_start": None, "router_temperature": None, "pooling": None}
        routing |= {"gate_power": 1.0, "gate_power_scope": "factors"}
        return replace(self, num_experts=1, shared_experts=0, style="per_linear", lora_modules=[], freeze=[], **routing)

    @property
    def num_in_layer(self) -> int:
        """The experts of a routed layer: E that the router chooses from, then those that are shared.

        With style `decoder_layer` the layer itself is one of the E.
        """
        return 1 if self.style == "decoder_layer" else self.num_experts + self.shared_experts

    def check_packed_base(self, key: str) -> None:
        """Make sure that experts can be trained on a base in 4 bits.

        Args:
            key: what says that it is

        Raises:
            ConfigError: they read or write its weights
        """
        remedy = f"Or load the base in 16 bits ({key})."
        allowed = f"lora or moslora on a base in 4 bits, which has no rows whose lengths could be trained ({key})"
        require(self.expert != "dora", "adapter.expert", self.expert, allowed, remedy)
        allowed = (
            f"loftq, kaiming, gaussian or gradient on a base in 4 bits, from which nothing can be taken off ({key})"
        )
        require(self.init != "svd", "adapter.init", self.init, allowed, remedy)

    @property
    def shifts_base(self) -> bool:
        """Whether experts start from parts of the base's weights, which these go without from then on."""
        return self.init in ("svd", "loftq")

    @property
    def frozen(self) -> set[Role]:
        """Roles that are not trained: those of `freeze`, and a router that has nothing to learn."""
        return set(self.freeze) if ROUTERS[self.router].is_trained else {*self.freeze, "router"}

    @property
    def num_used(self) -> int:
        """How many experts a router chooses for a token at most."""
        return self.top_k or self.num_experts

    def more_experts(self, step: int) -> int:
        """How many experts more than `top_k` a token uses in training after `step` optimizer steps.

        ceil((E - K) (1 - step / top_k_warmup)), and 0 from step `top_k_warmup` on
        """
        if not self.top_k_warmup or self.top_k is None or step >= self.top_k_warmup:
            return 0
        return -(-(self.num_experts - self.top_k) * (self.top_k_warmup - step) // self.top_k_warmup)

    @property
    def scale(self) -> float:
        """s = alpha / R, or alpha / sqrt(R) with rsLoRA."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass
class LossesConfig:
    """Losses of routers and experts, added to that of the text; a weight of 0 switches one off.

    Args:
        balance: weight of the balance loss, `E sum_e f_e P_e`, the mean over layers: evens out how many tokens an
            expert gets (it is 1 where they are even)
        z: weight of the z loss, the mean square of the logits' logsumexp: keeps logits small
        contrastive: weight of InfoNCE over the outputs of a layer's experts: those of the same expert for other tokens
            of the sequence are positives, those of other experts negatives (Luo et al. 2024)
        contrastive_coactive: weight of the same for one token: outputs of its other selected experts are positives,
            those of the rest negatives (CoMoE, Feng et al. 2025)
        contrastive_temperature: by which both divide cosines (0.07 is MoCo's, our choice: CoMoE prints none)
        contrastive_tokens: N, tokens drawn from each row for both; time and memory of `contrastive` grow with (N K)^2
    """

    balance: float = 0.0
    z: float = 0.0
    contrastive: float = 0.0
    contrastive_coactive: float = 0.0
    contrastive_temperature: float = 0.07
    contrastive_tokens: int = 16

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            usual = 0.001 if name == "z" else 0.01
            require(weight >= 0, f"losses.{name}", weight, "0 or more", f"0 switches it off, {usual} is common.")
        tau = self.contrastive_temperature
        require(tau > 0, "losses.contrastive_temperature", tau, "above 0", "The default is 0.07.")
        tokens = self.contrastive_tokens
        require(tokens >= 2, "losses.contrastive_tokens", tokens, "2 or more", "The default is 16.")
        if not (self.contrastive or self.contrastive_coactive):
            where = "where no contrastive loss is switched on"
            require_unset("losses", self, where, "contrastive_temperature", "contrastive_tokens")

    @property
    def weights(self) -> dict[str, float]:
        """Of every loss by its name."""
        names = ("balance", "z", "contrastive", "contrastive_coactive")
        return {name: getattr(self, name) for name in names}
