"""Speed of a mixture of experts, beside the dense MLP of the same active FLOPs and beside transformers' Mixtral.

    python benchmarks/moe_throughput.py                8 experts, top-2, d 1024, d_ff 4096, 16k tokens; one GPU
    python benchmarks/moe_throughput.py --profile      and where the time goes, kernel by kernel
    python benchmarks/moe_throughput.py --autotune     and everything with torch.compile's max-autotune; many minutes
    python benchmarks/moe_throughput.py --smoke        tiny, also on a CPU: does it all work?

Forward and backward of one Block, and of its MLP alone, on random bf16 numbers, without an optimizer. The dense MLP has
as many hidden units as a token's experts have together. raygrow's experts also compute their load-balancing loss and
its gradient. transformers' Mixtral gets raygrow's weights and is checked to compute the same; it runs compiled and
eager, with every implementation of its experts that works here, and its fastest run counts. All arms are warmed up,
then take turns; a figure is the median. MFU is active FLOPs against the datasheet's dense bf16 peak; the floor is the
time of those FLOPs at the rate of a large matrix product, measured in the same run.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from common import matmul_flops_per_second, write_results
from torch import Tensor, nn

from raygrow.nn.attention import default_attend
from raygrow.nn.block import Block
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import block_flops, peak_flops
from raygrow.nn.init import init_weights
from raygrow.nn.rope import rope_angles

EXPERTS = ModelConfig(
    vocab_size=256, d_model=1024, n_heads=16, d_ff=4096, blocks_per_stack=1, max_seq_len=2048, n_experts=8, top_k=2
)
SMOKE = replace(EXPERTS, d_model=64, n_heads=2, head_dim=32, n_kv_heads=2, d_ff=128, d_expert=128, max_seq_len=32)
SEQUENCES = 8
BALANCING = 0.01
DENSE, OURS, THEIRS = "dense", "raygrow", "transformers"


@dataclass(kw_only=True)
class Arm:
    """Something whose speed is measured."""

    part: str
    """What is computed: `block` or `mlp`, and the kind of MLP."""
    who: str
    how: str
    flops: float
    """Active FLOPs of a forward and backward pass."""
    step: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.part}: {self.who}, {self.how}"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Inputs:
    """What every arm gets: hidden states, the gradient of the output, rotary angles."""

    x_BTD: Tensor
    direction_BTD: Tensor
    rope: tuple[Tensor, Tensor]

    @classmethod
    def random(cls, config: ModelConfig, device: torch.device) -> "Inputs":
        shape = SEQUENCES, config.max_seq_len, config.d_model
        x_BTD, direction_BTD = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        positions_T = torch.arange(config.max_seq_len, device=device)
        cos_TH, sin_TH = rope_angles(positions_T, head_dim=config.head_dim, theta=config.rope_theta)
        return cls(x_BTD.requires_grad_(), direction_BTD, (cos_TH.bfloat16(), sin_TH.bfloat16()))

    def step(self, run: Callable[..., Any], parameters: list[nn.Parameter], *more: Any, **options: Any) -> None:
        """Forward and backward."""
        out = run(self.x_BTD, *more, **options)
        out_BTD, balance = out[:2] if isinstance(out, tuple) else (out, None)
        outputs, directions = [out_BTD], [self.direction_BTD]
        if balance is not None:
            outputs.append(BALANCING * balance.loss_B.sum())
            directions.append(torch.ones_like(outputs[1]))
        torch.autograd.grad(outputs, [self.x_BTD, *parameters], directions)


def main() -> None:
    """Measures, prints, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="GPU time of each kernel of the experts")
    parser.add_argument("--autotune", action="store_true", help="compile everything with max-autotune as well")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # some of transformers' implementations would be fetched
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # of one function, which arms share
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SMOKE if arguments.smoke else EXPERTS
    compilers: dict[str, dict[str, Any]] = {"compiled": {"backend": "aot_eager" if arguments.smoke else "inductor"}}
    if arguments.autotune:
        compilers["max-autotune"] = {"mode": "max-autotune-no-cudagraphs"}
    inputs, failures = Inputs.random(config, device), {}
    blocks, arms = our_arms(config, inputs, compilers)
    arms += mixtral_arms(replace(config, mlp="swiglu"), inputs, blocks["swiglu"], compilers, failures)
    arms = measure(arms, device, failures, turns=3 if arguments.smoke else 40)
    result = summary(arms, device) | {"failures": failures, "config": asdict(config), "sequences": SEQUENCES}
    result["largest_load"] = {kind: largest_load(block, inputs.x_BTD) for kind, block in blocks.items()}
    print_result(result)
    if arguments.profile and device.type == "cuda":
        result["kernels"] = {arm.name: profile(arm) for arm in arms if arm.who == OURS and "mlp" in arm.part}
    if not arguments.smoke:
        print(f"written to {write_results('moe_throughput', result)}")


Compilers = dict[str, dict[str, Any]]
"""Ways to compile, by name: what torch.compile is told."""


def our_arms(config: ModelConfig, inputs: Inputs, compilers: Compilers) -> tuple[dict[str, Block], list[Arm]]:
    """Raygrow's Blocks with experts, by the kind of MLP, and all arms of raygrow: with experts and dense."""
    blocks, arms = {}, []
    more = inputs.rope, default_attend(config)
    for kind in ("swiglu", "gelu"):
        experts = replace(config, mlp=kind)
        dense = replace(experts, d_ff=experts.top_k * experts.d_expert, n_experts=0, top_k=0, d_expert=0)
        for who, its_config in ((DENSE, dense), (OURS, experts)):
            block = Block(its_config, 0).to(inputs.x_BTD.device, torch.bfloat16)
            init_weights(block, its_config, seed=0)
            blocks[kind] = block  # the last one has the experts
            for part, module, others in (("block", block, more), ("mlp", block.mlp, ())):
                flops = inputs.x_BTD.shape[:2].numel() * flops_per_token(part, its_config)
                for how, settings in compilers.items():
                    # as training compiles its Blocks
                    run = torch.compile(module, fullgraph=True, dynamic=False, **settings)
                    step = partial(inputs.step, run, list(module.parameters()), *others)
                    arms.append(Arm(part=f"{part}, {kind}", who=who, how=how, flops=flops, step=step))
    return blocks, arms


def mixtral_arms(
    config: ModelConfig, inputs: Inputs, block: Block, compilers: Compilers, failures: dict[str, str]
) -> list[Arm]:
    """Transformers' Mixtral layer with the weights of a Block, and its experts alone, in every way that may run."""
    from transformers import MixtralConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

    arms, options = [], {"position_embeddings": tuple(angles_TH[None] for angles_TH in inputs.rope)}
    for implementation in ("eager", *ALL_EXPERTS_FUNCTIONS):
        its_config = MixtralConfig(
            hidden_size=config.d_model,
            intermediate_size=config.d_expert,
            num_local_experts=config.n_experts,
            num_experts_per_tok=config.top_k,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            **dict[str, Any](attn_implementation="sdpa", experts_implementation=implementation),
        )
        assert its_config._experts_implementation == implementation
        layer: Any = MixtralDecoderLayer(its_config, 0).to(inputs.x_BTD.device, torch.bfloat16)
        layer.load_state_dict(mixtral_weights(block))
        try:
            check_same(layer.mlp, block.mlp, inputs.x_BTD)
        except Exception as error:  # not installed, too little memory, or anything else
            failures[f"{THEIRS}, {implementation}"] = first_line(error)
            continue
        for part, module, its_options in (("block", layer, options), ("mlp", layer.mlp, {})):
            flops = inputs.x_BTD.shape[:2].numel() * flops_per_token(part, config)
            ways: dict[str, Any] = {"not compiled": module}
            if implementation != "eager":  # whose loop looks at the data: there is nothing to compile
                ways |= {how: torch.compile(module, dynamic=False, **settings) for how, settings in compilers.items()}
            for how, run in ways.items():
                step = partial(inputs.step, run, list(module.parameters()), **its_options)
                way = f"{implementation}, {how}"
                arms.append(Arm(part=f"{part}, {config.mlp}", who=THEIRS, how=way, flops=flops, step=step))
    return arms


def mixtral_weights(block: Block) -> dict[str, Tensor]:
    """A Block's weights under transformers' names."""
    weights = dict(block.named_parameters())
    gate, up, down = (weights[f"mlp.experts.{name}.weight"] for name in ("gate", "up", "down"))
    return {
        "input_layernorm.weight": weights["attention_norm.weight"],
        "post_attention_layernorm.weight": weights["mlp_norm.weight"],
        **{f"self_attn.{name}_proj.weight": weights[f"attention.{name}.weight"] for name in "qkvo"},
        "mlp.gate.weight": weights["mlp.router.weight"],
        "mlp.experts.gate_up_proj": torch.cat((gate, up), dim=1),
        "mlp.experts.down_proj": down,
    }


@torch.no_grad()
def check_same(theirs: nn.Module, ours: nn.Module, x_BTD: Tensor) -> None:
    """Raises unless both compute the same function."""
    expected_BTD = ours(x_BTD)[0]
    difference = ((theirs(x_BTD) - expected_BTD).norm() / expected_BTD.norm()).item()
    if difference > 0.01:
        raise ValueError(f"its outputs differ by {difference:.2g} of raygrow's")


@torch.no_grad()
def largest_load(block: Block, x_BTD: Tensor) -> float:
    """Tokens of the busiest expert, as a multiple of an even share."""
    load_E = block.mlp(x_BTD)[1].load_BE.sum(0).double()
    return (load_E.max() / load_E.mean()).item()


def flops_per_token(part: str, config: ModelConfig) -> float:
    """Active FLOPs, forward and backward, of a Block or of its MLP alone."""
    c = config
    if part == "block":
        return block_flops(c, 0, c.max_seq_len).training
    hidden = c.top_k * c.d_expert if c.n_experts else c.d_ff
    return 3 * 2 * c.d_model * ((3 if c.mlp == "swiglu" else 2) * hidden + c.n_experts)


def measure(arms: list[Arm], device: torch.device, failures: dict[str, str], *, turns: int) -> list[Arm]:
    """Warms all arms up, leaves out those of transformers that cannot run, and times the others in turns."""
    running = []
    for arm in arms:
        try:
            for _ in range(3):
                arm.step()
            running.append(arm)
        except Exception as error:
            if arm.who != THEIRS:
                raise
            failures[arm.name] = first_line(error)
    for _ in range(turns):
        for arm in running:
            arm.step()  # leaves the caches as this arm finds them when it runs by itself
            arm.seconds.append(seconds_of(arm.step, device))
    return running


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, on the GPU where there is one."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    step()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def summary(arms: list[Arm], device: torch.device) -> dict[str, Any]:
    """Rows of figures, and the ratios that the goals are about."""
    is_cuda = device.type == "cuda"
    rate = matmul_flops_per_second(device) if is_cuda else None
    peak = peak_flops(torch.cuda.get_device_name()) if is_cuda else None
    rows, best = [], {}
    for arm in sorted(arms, key=lambda arm: (arm.part, arm.median)):
        best.setdefault((arm.part, arm.who), arm)
        row = {"part": arm.part, "who": arm.who, "how": arm.how, "ms": 1e3 * arm.median, "flops": arm.flops}
        row["mfu"] = peak and arm.flops / arm.median / peak
        row["times_floor"] = rate and arm.median * rate / arm.flops
        rows.append(row)
    ratios = {}
    for (part, who), arm in best.items():
        if who != OURS:
            ours = best[part, OURS]
            # speed in active FLOPs: those of the router come on top of the dense MLP's
            ratios[f"{part}: {OURS} / {who} ({arm.how})"] = ours.flops / ours.median * arm.median / arm.flops
    return {"matmul_flops_per_second": rate, "datasheet_flops_per_second": peak, "rows": rows, "ratios": ratios}


def print_result(result: dict[str, Any]) -> None:
    """The figures as a table, the best ratios under it."""
    print(f"\n{'':16}{'':13}{'':30}{'ms':>9}{'MFU':>8}{'times the floor':>17}")
    for row in result["rows"]:
        figures = f"{row['mfu']:8.1%}{row['times_floor']:17.2f}" if row["mfu"] else ""
        print(f"{row['part']:16}{row['who']:13}{row['how']:30}{row['ms']:9.3f}{figures}")
    for name, failure in result["failures"].items():
        print(f"{name}: {failure}")
    for kind, load in result["largest_load"].items():
        print(f"busiest expert, {kind}: {load:.2f} of an even share")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.3f}")


PHASES = {
    "grouped products": ("rouped_gemm", "GroupProblemShape", "grouped_mm"),
    "routing": ("topk", "TopK", "softmax", "adix", "itonic", "sort", "cumsum", "scan"),
    "gather and combine": ("index", "gather", "scatter"),
    "other products": ("gemm", "nvjet", "cutlass", "splitK"),
}
"""Words in the names of kernels, by phase; the first that fits counts. The rest is activations and sums."""


def profile(arm: Arm, steps: int = 5) -> dict[str, float]:
    """Prints GPU milliseconds a step by phase and by kernel; returns those by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            arm.step()
        torch.cuda.synchronize()
    kernels = {event.key: event.self_device_time_total / 1e3 / steps for event in profiler.key_averages()}
    kernels = dict(sorted(((name, ms) for name, ms in kernels.items() if ms), key=lambda row: -row[1]))
    phases: dict[str, float] = {}
    for name, ms in kernels.items():
        phase = next((p for p, words in PHASES.items() if any(word in name for word in words)), "the rest")
        phases[phase] = phases.get(phase, 0.0) + ms
    print(f"\n{arm.name}: {sum(kernels.values()):.3f} ms of kernels")
    for table in (phases, dict(list(kernels.items())[:20])):
        for name, ms in table.items():
            print(f"{ms:9.3f}  {name[:110]}")
    return kernels


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


if __name__ == "__main__":
    main()
