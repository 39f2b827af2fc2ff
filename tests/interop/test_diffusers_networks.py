"""Tiny networks of diffusers with random weights: x0 is what their pipeline's call and their scheduler give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde import interop

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it comes with the extra `test`")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its own deprecations

B = 2
TEXT = 7  # tokens


def some(*shape: int, seed: int = 1) -> Tensor:
    return ss.Noise(seed).normal((B, *shape), 0)


def ones(*shape: int) -> Tensor:
    return torch.ones(B, *shape, dtype=torch.long)


def mask(*shape: int) -> Tensor:
    return torch.ones(B, *shape, dtype=torch.bool)


def ids(n: int, axes: int = 3) -> Tensor:
    return torch.stack([torch.arange(n)] * axes, dim=1).float()


Call = Callable[[Any, Tensor, Tensor, dict[str, Any]], Tensor]  # network, state, label of the scheduler, conditions


def plain(net: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    return net(x, timestep=t, **cond, return_dict=False)[0]


def unit(net: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    return net(x, timestep=t / 1000, **cond, return_dict=False)[0]


def learned(net: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    return plain(net, x, t, cond).chunk(2, dim=1)[0]


def lumina(net: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    out = net(x, timestep=1 - t / 1000, **cond, return_dict=False)
    out = out[0]
    return -(out.chunk(2, dim=1)[0] if out.shape[1] == 2 * x.shape[1] else out)


def sana(net: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    return net(x, timestep=t * net.config.timestep_scale, **cond, return_dict=False)[0]


def hidream(net: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    return -net(x, timesteps=t, **cond, return_dict=False)[0]


def z_image(net: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    out = net(list(x.unsqueeze(2).unbind(0)), (1000 - t) / 1000, **cond, return_dict=False)[0]
    return -torch.stack(list(out), dim=0).squeeze(2)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    cond: dict[str, Any] = field(default_factory=dict)
    call: Call = plain
    flow: bool = True
    scheduler: Callable[[], Any] | None = None
    seen: float = 1e-4  # least difference that another label makes


def build(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(diffusers, name)(**config)


UNET = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
ROPE = {**HEADS, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}

CASES: dict[str, Case] = {
    "UNet2D": Case(
        build("UNet2DModel", **UNET, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
        (3, 8, 8),
        flow=False,
    ),
    "UNet2D with a learned variance": Case(
        build(
            "UNet2DModel",
            **UNET,
            out_channels=6,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        (3, 8, 8),
        call=learned,
        flow=False,
    ),
    "UNet2DCondition": Case(
        build(
            "UNet2DConditionModel",
            **UNET,
            cross_attention_dim=6,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        (4, 8, 8),
        {"encoder_hidden_states": some(TEXT, 6)},
        flow=False,
    ),
    "DiT": Case(
        build(
            "DiTTransformer2DModel",
            **HEADS,
            num_layers=1,
            in_channels=4,
            out_channels=8,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        (4, 8, 8),
        {"class_labels": torch.tensor([1, 3])},
        call=learned,
        flow=False,
        scheduler=lambda: diffusers.DDIMScheduler(clip_sample=False),
    ),
    "PixArt": Case(
        build(
            "PixArtTransformer2DModel",
            **HEADS,
            num_layers=1,
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=6,
            use_additional_conditions=False,
        ),
        (4, 8, 8),
        {"encoder_hidden_states": some(TEXT, 6), "encoder_attention_mask": ones(TEXT).float(), "added_cond_kwargs": {}},
        call=learned,
        flow=False,
    ),
    "HunyuanDiT": Case(
        build(
            "HunyuanDiT2DModel",
            **HEADS,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=2,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=4,
            text_len=4,
            text_len_t5=4,
            activation_fn="gelu-approximate",
        ),
        (4, 8, 8),
        {
            "encoder_hidden_states": some(4, 8),
            "text_embedding_mask": ones(4),
            "encoder_hidden_states_t5": some(4, 8),
            "text_embedding_mask_t5": ones(4),
            "image_meta_size": some(6),
            "style": torch.zeros(B, dtype=torch.long),
            "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
        },
        call=learned,
        flow=False,
    ),
    "Latte": Case(
        build(
            "LatteTransformer3DModel",
            **HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=16,
            caption_channels=6,
            norm_type="ada_norm_single",
            num_embeds_ada_norm=1000,
            video_length=3,
            norm_elementwise_affine=False,
            attention_bias=True,
        ),
        (4, 3, 8, 8),
        {"encoder_hidden_states": some(TEXT, 6), "enable_temporal_attentions": True},
        call=learned,
        flow=False,
    ),
    "CogVideoX": Case(
        build(
            "CogVideoXTransformer3DModel",
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            time_embed_dim=4,
            text_embed_dim=6,
            max_text_seq_length=TEXT,
        ),
        (3, 4, 8, 8),
        {"encoder_hidden_states": some(TEXT, 6)},
        flow=False,
        scheduler=lambda: diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    ),
    "SD3": Case(
        build(
            "SD3Transformer2DModel",
            **HEADS,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            joint_attention_dim=6,
            caption_projection_dim=16,
            pooled_projection_dim=5,
            pos_embed_max_size=8,
        ),
        (4, 8, 8),
        {"encoder_hidden_states": some(TEXT, 6), "pooled_projections": some(5)},
    ),
    "Flux": Case(
        build(
            "FluxTransformer2DModel",
            **ROPE,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=6,
            pooled_projection_dim=5,
            guidance_embeds=True,
        ),
        (16, 4),
        {
            "encoder_hidden_states": some(TEXT, 6),
            "pooled_projections": some(5),
            "guidance": torch.full((B,), 3.5),
            "txt_ids": ids(TEXT),
            "img_ids": ids(16),
        },
        call=unit,
    ),
    "Flux2": Case(
        build(
            "Flux2Transformer2DModel",
            **{**ROPE, "axes_dims_rope": (4, 4, 4, 4)},
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=6,
            timestep_guidance_channels=8,
        ),
        (16, 4),
        {
            "encoder_hidden_states": some(TEXT, 6),
            "guidance": torch.full((B,), 3.5),
            "txt_ids": ids(TEXT, 4),
            "img_ids": ids(16, 4),
        },
        call=unit,
    ),
    "Chroma": Case(
        build(
            "ChromaTransformer2DModel",
            **ROPE,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=6,
            approximator_num_channels=8,
            approximator_hidden_dim=8,
            approximator_layers=1,
        ),
        (16, 4),
        {"encoder_hidden_states": some(TEXT, 6), "txt_ids": ids(TEXT), "img_ids": ids(16)},
        call=unit,
    ),
    "QwenImage": Case(
        build(
            "QwenImageTransformer2DModel",
            **ROPE,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            joint_attention_dim=6,
        ),
        (16, 16),
        {
            "encoder_hidden_states": some(TEXT, 6),
            "encoder_hidden_states_mask": mask(TEXT),
            "img_shapes": [[(1, 4, 4)]] * B,
        },
        call=unit,
    ),
    "AuraFlow": Case(
        build(
            "AuraFlowTransformer2DModel",
            **HEADS,
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=6,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        ),
        (4, 8, 8),
        {"encoder_hidden_states": some(TEXT, 6)},
        call=unit,
    ),
    "LTX": Case(
        build(
            "LTXVideoTransformer3DModel",
            **HEADS,
            in_channels=4,
            out_channels=4,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=6,
        ),
        (8, 4),
        {
            "encoder_hidden_states": some(TEXT, 6),
            "encoder_attention_mask": mask(TEXT),
            "num_frames": 2,
            "height": 2,
            "width": 2,
            "rope_interpolation_scale": (0.3, 32.0, 32.0),
        },
    ),
    "Sana": Case(
        build(
            "SanaTransformer2DModel",
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=6,
            sample_size=8,
            timestep_scale=0.5,
        ),
        (4, 8, 8),
        {"encoder_hidden_states": some(TEXT, 6), "encoder_attention_mask": ones(TEXT).float()},
        call=sana,
    ),
    "Lumina2": Case(
        build(
            "Lumina2Transformer2DModel",
            sample_size=8,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=1,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(64, 64, 64),
            cap_feat_dim=6,
        ),
        (4, 8, 8),
        {"encoder_hidden_states": some(TEXT, 6), "encoder_attention_mask": mask(TEXT)},
        call=lumina,
    ),
    "LuminaNext": Case(
        build(
            "LuminaNextDiT2DModel",
            sample_size=8,
            hidden_size=24,
            num_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=8,
            cross_attention_dim=6,
        ),
        (4, 8, 8),
        {
            "encoder_hidden_states": some(TEXT, 6),
            "encoder_mask": mask(TEXT),
            "image_rotary_emb": torch.polar(torch.ones(16, 16, 4), torch.rand(16, 16, 4)),
            "cross_attention_kwargs": {},
        },
        call=lumina,
    ),
    "Wan": Case(
        build(
            "WanTransformer3DModel",
            **{**HEADS, "attention_head_dim": 12},
            in_channels=4,
            out_channels=4,
            text_dim=6,
            freq_dim=8,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        (4, 3, 4, 4),
        {"encoder_hidden_states": some(TEXT, 6)},
        scheduler=lambda: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ),
    "ZImage": Case(
        build(
            "ZImageTransformer2DModel",
            in_channels=4,
            dim=24,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=1,
            n_kv_heads=1,
            cap_feat_dim=6,
            axes_dims=[8, 8, 8],
            axes_lens=[256, 32, 32],
        ),
        (4, 8, 8),
        {"cap_feats": list(some(TEXT, 6).unbind(0))},
        call=z_image,
    ),
    "HiDream": Case(
        build(
            "HiDreamImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[6, 6],
            text_emb_dim=5,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(16, 16),
            llama_layers=[0, 0],
        ),
        (4, 8, 8),
        {
            "encoder_hidden_states_t5": some(TEXT, 6),
            "encoder_hidden_states_llama3": ss.Noise(2).normal((1, B, TEXT, 6), 0),
            "pooled_embeds": some(5),
        },
        call=hidream,
    ),
    "Mochi": Case(
        build(
            "MochiTransformer3DModel",
            **HEADS,
            num_layers=2,
            pooled_projection_dim=8,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=4,
            max_sequence_length=TEXT,
        ),
        (4, 2, 8, 8),
        {"encoder_hidden_states": some(TEXT, 16), "encoder_attention_mask": mask(TEXT)},
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ),
    "CogView4": Case(
        build(
            "CogView4Transformer2DModel",
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            text_embed_dim=6,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
            rope_axes_dim=(8, 8),
        ),
        (4, 8, 8),
        {
            "encoder_hidden_states": some(TEXT, 6),
            "original_size": torch.full((B, 2), 64.0),
            "target_size": torch.full((B, 2), 64.0),
            "crop_coords": torch.zeros(B, 2),
        },
    ),
    "HunyuanVideo": Case(
        build(
            "HunyuanVideoTransformer3DModel",
            **{**HEADS, "attention_head_dim": 16},
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=6,
            pooled_projection_dim=5,
            rope_axes_dim=(4, 6, 6),
        ),
        (4, 2, 4, 4),
        {
            "encoder_hidden_states": some(TEXT, 6),
            "encoder_attention_mask": mask(TEXT),
            "pooled_projections": some(5),
            "guidance": torch.full((B,), 6000.0),
        },
    ),
    "PRX": Case(
        build(
            "PRXTransformer2DModel",
            in_channels=4,
            context_in_dim=6,
            hidden_size=16,
            num_heads=2,
            depth=1,
            axes_dim=[4, 4],
        ),
        (4, 8, 8),
        {"encoder_hidden_states": some(TEXT, 6), "attention_mask": mask(TEXT)},
        call=unit,
    ),
    "StableAudio": Case(
        build(
            "StableAudioDiTModel",
            sample_size=4,
            in_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        ),
        (4, 4),
        {
            "encoder_hidden_states": some(TEXT, 4),
            "global_hidden_states": some(1, 8),
            "rotary_embedding": (torch.ones(5, 2), torch.zeros(5, 2)),
        },
        flow=False,
        scheduler=lambda: diffusers.CosineDPMSolverMultistepScheduler(),
    ),
    "UNet1D": Case(
        build(
            "UNet1DModel",
            block_out_channels=(8, 8, 32),
            extra_in_channels=16,
            sample_size=32,
            sample_rate=16000,
            in_channels=2,
            out_channels=2,
            use_timestep_embedding=False,
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "DownBlock1D"),
            up_block_types=("UpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
            mid_block_type="UNetMidBlock1D",
            flip_sin_to_cos=True,
            freq_shift=0.0,
        ),
        (2, 32),
        flow=False,
        scheduler=lambda: diffusers.IPNDMScheduler(),
    ),
}


def scheduler_of(case: Case) -> Any:
    if case.scheduler is not None:
        return case.scheduler()
    return diffusers.FlowMatchEulerDiscreteScheduler() if case.flow else diffusers.DDPMScheduler()


def network_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = CASES[name].make().eval()
        with torch.no_grad():  # final layers of some classes start at 0, which would hide every mistake
            for p in net.parameters():
                if not p.any():
                    p.normal_(std=0.3)
    return net


def label_of_scheduler(scheduler: Any, t: float) -> float:
    if type(scheduler).__name__ == "IPNDMScheduler":
        return t
    if type(scheduler).__name__.startswith("Cosine"):
        return float(torch.tensor(t).atan() / torch.pi * 2)
    if scheduler.config.get("invert_sigmas"):
        return 1000 * (1 - t)
    return t - 1 if t > 1 else 1000 * t


def data_of(scheduler: Any, sde: ss.SDE, out: Tensor, x: Tensor, t: float) -> Tensor:
    """Data that the scheduler computes from the output."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    kind = scheduler.config.get("prediction_type")
    if type(scheduler).__name__ == "IPNDMScheduler" or (
        kind == "v_prediction" and not hasattr(scheduler, "precondition_outputs")
    ):
        return alpha * x - sigma * out
    if hasattr(scheduler, "precondition_outputs"):
        return scheduler.precondition_outputs(x, out, t)
    if scheduler.config.get("invert_sigmas"):
        return x + sigma * out
    return x - sigma * out if isinstance(sde, ss.Flow) else (x - sigma * out) / alpha


def pipeline_x0(name: str, net: Any, sde: ss.SDE, x: Tensor, t: float) -> Tensor:
    case = CASES[name]
    scheduler = scheduler_of(case)
    label = torch.full((B,), label_of_scheduler(scheduler, t))
    seen = scheduler.precondition_inputs(x, t) if hasattr(scheduler, "precondition_inputs") else x
    return data_of(scheduler, sde, case.call(net, seen, label, case.cond), x, t)


def middle(sde: ss.SDE) -> float:
    return 400.0 if isinstance(sde, ss.Discrete) else 0.4


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_x0_is_that_of_the_pipeline(name: str) -> None:
    case, net = CASES[name], network_of(name)
    model = interop.from_diffusers(net, scheduler_of(case)).given(**case.cond)
    x, t = some(*case.shape, seed=0), middle(model.sde)
    got, want = model.x0(x, t), pipeline_x0(name, net, model.sde, x, t)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    other = pipeline_x0(name, net, model.sde, x, t * 0.98)
    assert not torch.allclose(got, other, rtol=1e-4, atol=1e-4 * float(want.abs().max())), "it sees its label"
    # One sample at a time, and the samples of an adaptive run: positions belong to all samples.
    one = model.rows(torch.tensor([1])).x0(x[1:], t)
    if name not in ("QwenImage", "ZImage", "HiDream"):  # whose conditions are lists over the batch
        assert torch.allclose(one, got[1:], rtol=1e-3, atol=1e-3 * float(want.abs().max()))


# Pipelines, half precision, compilation, guidance and other devices.

FEW = ["UNet2DCondition", "DiT", "PixArt", "SD3", "Flux", "LTX", "Sana", "AuraFlow", "Wan", "Lumina2"]


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_half_precision_casts_what_the_network_needs(name: str) -> None:
    case, net = CASES[name], network_of(name)
    model = interop.from_diffusers(net, scheduler_of(case)).given(**case.cond)
    x, t = some(*case.shape, seed=0), middle(model.sde)
    want = model.x0(x, t)
    model.to(torch.bfloat16)
    got = model.x0(x, t)
    assert got.dtype == torch.float32
    # bfloat16 has 8 bits; the data is recovered from the noise with 1/α.
    assert float((got - want).norm() / want.norm()) < 0.05 / model.sde.alpha(t)


@pytest.mark.parametrize("name", ["UNet2DCondition", "DiT", "Flux", "Lumina2"])
@torch.no_grad()
def test_compiled_networks_keep_their_conventions(name: str) -> None:
    case, net = CASES[name], network_of(name)
    scheduler = scheduler_of(case)
    x = some(*case.shape, seed=0)
    plain_model = interop.from_diffusers(net, scheduler)
    t = middle(plain_model.sde)
    compiled = interop.from_diffusers(torch.compile(net, backend="eager"), scheduler)
    assert compiled.kind == plain_model.kind
    want = plain_model.given(**case.cond).x0(x, t)
    assert torch.allclose(compiled.given(**case.cond).x0(x, t), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("one_forward", [False, True])
@pytest.mark.parametrize("name", ["UNet2DCondition", "SD3", "Flux"])
@torch.no_grad()
def test_guidance_with_null_embeddings(name: str, one_forward: bool) -> None:
    case, net = CASES[name], network_of(name)
    model = interop.from_diffusers(net, scheduler_of(case))
    x, t = some(*case.shape, seed=0), middle(model.sde)
    null = torch.zeros(1, *case.cond["encoder_hidden_states"].shape[1:])
    guided = ss.ClassifierFree(model, 3.0, null={"encoder_hidden_states": null}, one_forward=one_forward)
    strong = model.given(**case.cond).x0(x, t)
    weak = model.given(**{**case.cond, "encoder_hidden_states": null}).x0(x, t)
    want = weak + 3 * (strong - weak)
    assert torch.allclose(guided.given(**case.cond).x0(x, t), want, rtol=1e-3, atol=1e-3)


def test_a_denoiser_moves_to_another_device_and_dtype() -> None:
    case, net = CASES["UNet2DCondition"], network_of("UNet2DCondition")
    model = interop.from_diffusers(net, scheduler_of(case)).to("meta")
    cond = {name: value.to("meta") for name, value in case.cond.items()}
    out = model.given(**cond).x0(torch.empty(B, *case.shape, device="meta"), 400.0)
    assert out.device.type == "meta" and out.shape == (B, *case.shape)


def test_a_pipeline_brings_its_network_and_its_scheduler() -> None:
    net = network_of("UNet2D")
    pipe = diffusers.DDPMPipeline(unet=net, scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction"))
    model = interop.from_diffusers(pipe)
    assert model.predicts == "v" and any(p is next(net.parameters()) for p in model.parameters())
    other = interop.from_diffusers(pipe, diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    assert other.predicts == "eps" and other.sde == ss.Discrete(ss.processes.betas("cosine", 1000))
    with pytest.raises(TypeError, match="without a unet, transformer, prior or decoder"):
        interop.from_diffusers(SimpleNamespace(scheduler=pipe.scheduler))
    two = SimpleNamespace(scheduler=pipe.scheduler, transformer=net, transformer_2=net)
    with pytest.raises(ValueError, match="two networks for two ranges of noise"):
        interop.from_diffusers(two)


def test_variances_of_networks_with_twice_the_channels() -> None:
    for kind, scheduler in (
        ("range", diffusers.DDIMScheduler()),  # DiT's, which says nothing
        ("range", diffusers.DDPMScheduler(variance_type="fixed_small")),
        ("value", diffusers.DDPMScheduler(variance_type="learned")),
        ("range", diffusers.DDPMScheduler(variance_type="learned_range")),
    ):
        assert interop.from_diffusers(network_of("DiT"), scheduler).kind.variance == kind
    assert (
        interop.from_diffusers(network_of("LuminaNext"), diffusers.FlowMatchEulerDiscreteScheduler()).kind.variance
        is None
    )


class LTX2VideoTransformer3DModel(nn.Module):
    pass


def test_networks_of_two_states_are_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match="LTX2VideoTransformer3DModel, which has no denoiser here: its state is a pair"
    ):
        interop.from_diffusers(LTX2VideoTransformer3DModel(), diffusers.FlowMatchEulerDiscreteScheduler())


@torch.no_grad()
def test_a_whole_run_is_that_of_the_scheduler() -> None:
    """Euler's scheduler of flows, with its shift, and our DDIM on its grid, through a transformer."""
    case, net = CASES["SD3"], network_of("SD3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = interop.from_diffusers(net, scheduler).given(**case.cond)
    x = start = some(*case.shape, seed=0)
    ours = ss.sample(model, start, ss.DDIM(), grid=ss.grids.from_scheduler(model, 6, scheduler))
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        x = scheduler.step(plain(net, x, t.expand(B), case.cond), t, x).prev_sample
    assert torch.allclose(ours, x, rtol=1e-3, atol=1e-3)
