"""Our solvers as schedulers inside diffusers' own pipelines, made tiny with random weights: the images of their
schedulers where those are right, and those of our own loop around the same network everywhere."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.interop import to_diffusers
from scoresde.interop.schedulers import solver_of
from scoresde.solvers import Solver
from scoresde.solvers.interpolants import VELOCITY
from scoresde.solvers.runge_kutta import HEUN, RungeKutta

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it comes with the extra `test`")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; it comes with the extra `test`"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of their own deprecations

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
SMALL = {"height": 16, "width": 16, "guidance_scale": 2.0, "output_type": "np"}
COG = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0, **LATENT}
COG |= {"timestep_spacing": "trailing", "clip_sample": False}
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(7))
MASK = torch.zeros(1, 1, 16, 16).index_fill(3, torch.arange(8, 16), 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines without a download
# ---------------------------------------------------------------------------------------------------------------------


def vae(channels: int = 4) -> Any:
    made = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.06,
    )
    return made.eval()


@cache
def unet() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    options = {"layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 4, **blocks}
    return diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **options).eval()


def text_model() -> tuple[Any, Any]:
    """A tokenizer of two letters and its encoder."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3, "b": 4, "b</w>": 5, "ab</w>": 6}
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\na b</w>\n")
        files = (str(Path(folder) / "vocab.json"), str(Path(folder) / "merges.txt"))
        tokenizer = transformers.CLIPTokenizer(*files, model_max_length=8)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        vocab_size=7, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, **sizes
    )
    return tokenizer, transformers.CLIPTextModel(config).eval()


@cache
def stable_diffusion(kind: str = "", channels: int = 4) -> Any:
    torch.manual_seed(0)
    tokenizer, encoder = text_model()
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=net.eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **LATENT, **LEADING),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@cache
def dit() -> Any:
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=4,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
    )
    return diffusers.DiTPipeline(net.eval(), vae(), diffusers.DDIMScheduler(clip_sample=False))


@cache
def pixart() -> Any:
    torch.manual_seed(0)
    net = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    return diffusers.PixArtAlphaPipeline(None, None, vae(), net.eval(), diffusers.DPMSolverMultistepScheduler())


@cache
def sd3(kind: str = "", channels: int = 4) -> Any:
    torch.manual_seed(0)
    net = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=24,
    )
    texts = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = getattr(diffusers, f"StableDiffusion3{kind}Pipeline")
    return made(transformer=net.eval(), scheduler=scheduler, vae=vae(channels), **texts)


@cache
def flux() -> Any:
    torch.manual_seed(0)
    net = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return diffusers.FluxPipeline(scheduler, vae(), None, None, None, None, net.eval())


@cache
def ltx() -> Any:
    torch.manual_seed(0)
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    decoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    return diffusers.LTXPipeline(scheduler, decoder.eval(), None, None, net.eval())


@cache
def stable_audio() -> Any:
    torch.manual_seed(0)
    net = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=4,
        cross_attention_input_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
    )
    decoder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    sizes = {"d_model": 4, "d_kv": 4, "d_ff": 4, "num_layers": 1, "num_heads": 1, "vocab_size": 8}
    encoder = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    numbers = diffusers.StableAudioProjectionModel(text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0)
    return diffusers.StableAudioPipeline(decoder.eval(), encoder, numbers, None, net.eval(), scheduler)


@cache
def sdxl(kind: str = "") -> Any:
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    texts = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2")}
    scheduler = diffusers.EulerDiscreteScheduler(**LATENT, **LEADING)
    made = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")
    return made(vae=vae(), unet=net.eval(), scheduler=scheduler, add_watermarker=False, **texts)


@cache
def wan() -> Any:
    torch.manual_seed(0)
    net = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )
    decoder = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": decoder.eval(), "transformer": net.eval()}
    return diffusers.WanPipeline(scheduler=scheduler, **parts)


@cache
def cogvideox() -> Any:
    torch.manual_seed(0)
    net = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=4,
    )
    decoder = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    return diffusers.CogVideoXPipeline(None, None, decoder.eval(), net.eval(), diffusers.CogVideoXDDIMScheduler(**COG))


@cache
def audioldm2() -> Any:
    torch.manual_seed(0)
    net = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=(16, 16),
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    decoder = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 4, "num_layers": 1, "num_heads": 1, "vocab_size": 8}
    words = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0}
    none = ("text_encoder", "projection_model", "tokenizer", "tokenizer_2", "feature_extractor")
    sound = transformers.SpeechT5HifiGanConfig(model_in_dim=8, upsample_initial_channel=16)
    return diffusers.AudioLDM2Pipeline(
        vae=decoder.eval(),
        text_encoder_2=transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval(),
        language_model=transformers.GPT2LMHeadModel(transformers.GPT2Config(**words)).eval(),
        unet=net.eval(),
        scheduler=DDIM,
        vocoder=transformers.SpeechT5HifiGan(sound).eval(),
        **dict.fromkeys(none),
    )


def embeds(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def text(**more: int) -> dict[str, Tensor]:
    """Embeddings of a prompt, with those of the empty prompt as zeros."""
    made = {"prompt_embeds": embeds(1, 4, 16)} | {name: embeds(1, n) for name, n in more.items()}
    return made | {f"negative_{name}": torch.zeros_like(value) for name, value in made.items()}


MASKED = {"prompt_attention_mask": torch.ones(1, 4), "negative_prompt_attention_mask": torch.ones(1, 4)}
AUDIO = {
    "prompt_embeds": embeds(1, 4, 4),
    "negative_prompt_embeds": torch.zeros(1, 4, 4),
    "attention_mask": torch.ones(1, 4),
    "negative_attention_mask": torch.ones(1, 4),
    "output_type": "latent",
}
SOUND = {
    "prompt_embeds": embeds(1, 4, 16),
    "negative_prompt_embeds": torch.zeros(1, 4, 16),
    "generated_prompt_embeds": embeds(1, 3, 16),
    "negative_generated_prompt_embeds": torch.zeros(1, 3, 16),
    "attention_mask": torch.ones(1, 4),
    "negative_attention_mask": torch.ones(1, 4),
    "audio_length_in_s": 0.1,
    "num_inference_steps": 5,
    "output_type": "latent",
}
FLUX_TEXT = {"prompt_embeds": embeds(1, 4, 16), "pooled_prompt_embeds": embeds(1, 24)}


def pictures(pipe: Any, scheduler: Any, **options: Any) -> Tensor:
    """What a pipeline draws with a scheduler."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    try:
        out = pipe(generator=torch.Generator().manual_seed(1), **options)[0]
    finally:
        pipe.scheduler = own
    return torch.as_tensor(out[0] if isinstance(out, list) else out).double()


def discrete(name: str, **config: Any) -> Any:
    with warnings.catch_warnings():  # of numpy, when the module is collected
        warnings.simplefilter("ignore")
        return getattr(diffusers, f"{name}Scheduler")(**{**LATENT, **config})


# ---------------------------------------------------------------------------------------------------------------------
# 1. Their schedulers, where they are right
# ---------------------------------------------------------------------------------------------------------------------

DDIM = discrete("DDIM", clip_sample=False, set_alpha_to_one=False, **LEADING)
MULTI = [
    (discrete("DPMSolverMultistep"), ss.DPMSolverPP(2)),
    (discrete("DPMSolverMultistep", final_sigmas_type="sigma_min", lower_order_final=False), ss.DPMSolverPP(2)),
    (discrete("DPMSolverMultistep", algorithm_type="sde-dpmsolver++"), ss.SDEDPMSolverPP(2)),
    (discrete("UniPCMultistep"), ss.UniPC(2)),
]
# Euler's and Heun's schedulers start at x_T / α; on a grid that does not contain T that is their noise.
STAGED = [(discrete("EulerDiscrete", **LEADING), ss.DDIM()), (discrete("HeunDiscrete", **LEADING), ss.EDMHeun())]
ANCESTRAL = [
    (discrete("EulerAncestralDiscrete", **LEADING), ss.solvers.EulerAncestral()),
    (DDIM, ss.DDIM(1.0)),
]
FLOW = diffusers.FlowMatchEulerDiscreteScheduler

PROMPT = {"prompt": "ab", "num_inference_steps": 6, **SMALL}
CLASSES = {"class_labels": [1, 2], "num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "np"}
FIVE = {"num_inference_steps": 5, **SMALL}

Case = tuple[str, Callable[[], Any], Any, Solver, dict[str, Any]]


def cases() -> list[Case]:
    out: list[Case] = []
    for theirs, ours in [(DDIM, ss.DDIM()), *MULTI, *STAGED, *ANCESTRAL]:
        eta = {"eta": 1.0} if repr(ours) == "DDIM(eta=1)" else {}
        out.append(("stable diffusion", stable_diffusion, theirs, ours, {**PROMPT, **eta}))
    for theirs, ours in [(DDIM, ss.DDIM()), MULTI[0], MULTI[3], STAGED[1], ANCESTRAL[0]]:
        image = {**PROMPT, "image": IMAGE, "strength": 0.5}
        sizeless = {k: v for k, v in image.items() if k not in ("height", "width")}
        out.append(("image to image", lambda: stable_diffusion("Img2Img"), theirs, ours, sizeless))
        masked = {**image, "mask_image": MASK}
        out.append(("inpainting", lambda: stable_diffusion("Inpaint"), theirs, ours, masked))
    for theirs, ours in [(DDIM, ss.DDIM()), STAGED[1]]:
        whole = {"strength": 1.0}
        out.append(("image to image", lambda: stable_diffusion("Img2Img"), theirs, ours, {**sizeless, **whole}))
        out.append(("inpainting network", lambda: stable_diffusion("Inpaint", 9), theirs, ours, {**masked, **whole}))
    plain = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    out += [
        ("ddpm", lambda: diffusers.DDPMPipeline(unet(), DDIM), discrete("DDPM", clip_sample=False), ss.DDPM(), plain),
        ("ddpm clipped", lambda: diffusers.DDPMPipeline(unet(), DDIM), discrete("DDPM"), ss.DDPM(), plain),
        ("dit", dit, diffusers.DDPMScheduler(clip_sample=False), ss.DDPM(), CLASSES),
        ("dit", dit, diffusers.DPMSolverMultistepScheduler(), ss.DPMSolverPP(2), CLASSES),
    ]
    square = {**text(), **MASKED, **FIVE, "negative_prompt": None, "use_resolution_binning": False}
    out.append(("pixart", pixart, diffusers.DPMSolverMultistepScheduler(), ss.DPMSolverPP(2), square))
    pooled = {**text(pooled_prompt_embeds=24), **FIVE}
    image = {**pooled, "image": IMAGE, "strength": 0.6}
    wide: dict[str, Any] = {**image, "mask_image": MASK}
    out += [
        ("sd3", sd3, FLOW(shift=3.0), ss.DDIM(), pooled),
        ("sd3", sd3, FLOW(use_dynamic_shifting=True), ss.DDIM(), pooled),
        ("sd3", sd3, FLOW(use_karras_sigmas=True), ss.DDIM(), pooled),
        ("sd3", sd3, diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), RungeKutta(HEUN, VELOCITY), pooled),
        ("sd3 image to image", lambda: sd3("Img2Img"), FLOW(shift=3.0), ss.DDIM(), image),
        ("sd3 inpainting", lambda: sd3("Inpaint", 16), FLOW(shift=3.0), ss.DDIM(), wide),
        ("flux", flux, FLOW(use_dynamic_shifting=True), ss.DDIM(), {**FLUX_TEXT, **FIVE}),
        ("flux", flux, FLOW(use_dynamic_shifting=True, time_shift_type="linear"), ss.DDIM(), {**FLUX_TEXT, **FIVE}),
    ]
    video = {**text(), **MASKED, "height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4}
    film = {**video, "guidance_scale": 2.0, "output_type": "latent"}
    out.append(("ltx", ltx, FLOW(use_dynamic_shifting=True, shift_terminal=0.1), ss.DDIM(), film))
    sound = {**AUDIO, "num_inference_steps": 6, "guidance_scale": 2.0}
    edm = {"prediction_type": "v_prediction", "sigma_data": 1.0}
    continuous = {
        "prediction_type": "v_prediction",
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
        **LEADING,
    }
    levels = discrete("EulerDiscrete", sigma_min=0.002, sigma_max=700.0, **continuous)
    out += [
        ("stable audio", stable_audio, diffusers.EDMDPMSolverMultistepScheduler(**edm), ss.DPMSolverPP(2), sound),
        ("stable audio", stable_audio, diffusers.EDMEulerScheduler(**edm), ss.DDIM(), sound),
        ("continuous labels", stable_audio, levels, ss.DDIM(), sound),
    ]
    large = {**text(pooled_prompt_embeds=24), **FIVE}
    for theirs, ours in [*MULTI, *STAGED, ANCESTRAL[0]]:
        out.append(("sdxl", sdxl, theirs, ours, large))
    redrawn: dict[str, Any] = {k: v for k, v in large.items() if k not in ("height", "width")}
    out.append(("sdxl image to image", lambda: sdxl("Img2Img"), DDIM, ss.DDIM(), {**redrawn, "image": IMAGE}))
    film = {**text(), "height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 5, "guidance_scale": 2.0}
    film["output_type"] = "latent"
    out += [
        ("wan", wan, FLOW(shift=3.0), ss.DDIM(), film),
        ("cogvideox", cogvideox, diffusers.CogVideoXDDIMScheduler(**COG), ss.DDIM(), film),
        ("audioldm2", audioldm2, DDIM, ss.DDIM(), {**SOUND, "guidance_scale": 2.0}),
        ("audioldm2", audioldm2, MULTI[0][0], ss.DPMSolverPP(2), {**SOUND, "guidance_scale": 2.0}),
    ]
    return out


def name(case: Case) -> str:
    strength = f" {case[4]['strength']}" if "strength" in case[4] else ""
    return f"{case[0]}{strength}, {type(case[2]).__name__}, {case[3]!r}".replace("Scheduler", "")[:80]


@pytest.mark.parametrize("case", cases(), ids=name)
def test_a_pipeline_draws_what_it_draws_with_its_own_scheduler(case: Case) -> None:
    _, pipe, theirs, rule, options = case
    clip = 1.0 if theirs.config.get("clip_sample") else None
    ours = to_diffusers(rule, theirs, clip=clip)
    expected = pictures(pipe(), theirs, **options)
    size = max(1.0, float(expected.abs().max()))  # latents of ε-networks with random weights reach 30
    torch.testing.assert_close(pictures(pipe(), ours, **options), expected, rtol=0, atol=5e-6 * size)
    assert expected.std() > 0.01 and expected.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# 2. Our own loop around the same network
# ---------------------------------------------------------------------------------------------------------------------

EVERY = [
    ss.VelocityAB(3),
    ss.UniPC(3),
    ss.EDMHeun(),
    ss.DPMSolverPP(3, kind="single"),
    ss.SDEDPMSolverPP(2),
    ss.solvers.SEEDS(2),
    ss.solvers.SASolver(),
]


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize("grid", [None, "karras"])
def test_stable_diffusion_draws_the_latents_of_sample(rule: Solver, grid: str | None) -> None:
    pipe = stable_diffusion()
    ours = to_diffusers(rule, pipe.scheduler, grid=grid, seed=4)
    z, words = embeds(2, 4, 8, 8), embeds(2, 8, 16)
    options = {"prompt_embeds": words, "latents": z, "guidance_scale": 1.0, "num_inference_steps": 5}
    theirs = pictures(pipe, ours, **options, height=16, width=16, output_type="latent")
    model = ss.interop.from_diffusers(pipe).given(encoder_hidden_states=words)
    expected = ss.sample(model, z, rule, grid=ours.table.times, seed=4)
    torch.testing.assert_close(theirs[0], expected[0].double(), rtol=1e-4, atol=1e-4)
    if grid is not None:
        maker = getattr(ss.grids, grid)
        assert torch.equal(ss.solve(model, z, rule, grid=maker, steps=5, seed=4).x, expected)


@pytest.mark.parametrize("rule", EVERY[:3], ids=repr)
def test_flows_draw_the_latents_of_sample(rule: Solver) -> None:
    pipe = sd3()
    ours = to_diffusers(rule, pipe.scheduler, seed=4)
    z, condition = embeds(1, 4, 8, 8), text(pooled_prompt_embeds=24)
    options = {**condition, "latents": z, "guidance_scale": 1.0, "num_inference_steps": 5, "output_type": "latent"}
    theirs = pictures(pipe, ours, **options, height=16, width=16)
    model = ss.interop.from_diffusers(pipe.transformer, pipe.scheduler)
    words = {"encoder_hidden_states": condition["prompt_embeds"], "pooled_projections": embeds(1, 24)}
    expected = ss.sample(model.given(**words), z, rule, grid=ours.table.times)
    torch.testing.assert_close(theirs, expected.double(), rtol=1e-4, atol=1e-4)


WORDS = {"encoder_hidden_states": embeds(1, 4, 16)}
LARGE = {"text_embeds": embeds(1, 24), "time_ids": torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])}
HEARD = {
    "encoder_hidden_states": SOUND["generated_prompt_embeds"],
    "encoder_hidden_states_1": SOUND["prompt_embeds"],
    "encoder_attention_mask_1": SOUND["attention_mask"],
}
LATENTS: dict[str, tuple[Callable[[], Any], tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "sdxl": (sdxl, (1, 4, 8, 8), {**WORDS, "added_cond_kwargs": LARGE}, text(pooled_prompt_embeds=24)),
    "wan": (wan, (1, 4, 3, 2, 2), WORDS, {**text(), "num_frames": 9}),
    "cogvideox": (cogvideox, (1, 3, 4, 2, 2), WORDS, {**text(), "num_frames": 9}),
    "audioldm2": (audioldm2, (1, 4, 5, 32), HEARD, SOUND),
}


@pytest.mark.parametrize("rule", [ss.UniPC(3), ss.EDMHeun(), ss.SDEDPMSolverPP(2)], ids=repr)
@pytest.mark.parametrize("kind", LATENTS)
def test_other_pipelines_draw_the_latents_of_sample(kind: str, rule: Solver) -> None:
    make, shape, condition, given = LATENTS[kind]
    pipe = make()
    ours, z = to_diffusers(rule, pipe.scheduler, seed=4), embeds(*shape)
    size = {} if kind == "audioldm2" else {"height": 16, "width": 16}
    options = {**given, **size, "latents": z, "guidance_scale": 1.0, "num_inference_steps": 5, "output_type": "latent"}
    theirs = pictures(pipe, ours, **options)
    model = ss.interop.from_diffusers(pipe).given(**condition)
    expected = ss.sample(model, z * ours.init_noise_sigma, rule, grid=ours.table.times, seed=4).double()
    torch.testing.assert_close(theirs.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_noise_belongs_to_the_sample() -> None:
    pipe = stable_diffusion()
    ours = to_diffusers(ss.DDIM(1.0), pipe.scheduler, seed=2)
    z, words = embeds(3, 4, 8, 8), embeds(3, 8, 16)
    options = {"guidance_scale": 1.0, "num_inference_steps": 4, "height": 16, "width": 16, "output_type": "np"}
    whole = pictures(pipe, ours, prompt_embeds=words, latents=z, **options)
    first = pictures(pipe, ours, prompt_embeds=words[:1], latents=z[:1], **options)
    torch.testing.assert_close(first[0], whole[0], rtol=0, atol=1e-5)
    assert (whole[1] - whole[0]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# 3. The rest of a scheduler
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected", "order"),
    [(ss.UniPC(2), [0, 1, 2, 3], 1), (ss.EDMHeun(), [0, 1, 1, 2, 2, 3, 3], 2), (ss.solvers.DPM2(), None, 2)],
)
def test_labels_are_those_of_the_evaluations(rule: Solver, expected: list[int] | None, order: int) -> None:
    ours = to_diffusers(rule, discrete("DDIM", **LEADING))
    ours.set_timesteps(4)
    steps = [751, 501, 251, 1]
    assert ours.order == order
    assert ours.timesteps[::order].tolist() == pytest.approx(steps)
    if expected is not None:
        assert ours.timesteps.tolist() == [steps[i] for i in expected]
        assert ours.timesteps.dtype == torch.int64
    for i in range(4):
        assert ours.table.plan_from(i * order).rows[0].t == pytest.approx(steps[i] + 1)


def test_a_plan_has_its_own_steps_and_may_not_start_in_the_middle() -> None:
    sde = to_diffusers(ss.DDIM(), DDIM).sde
    plan = ss.UniPC(2).plan(sde, [900.0, 500.0, 200.0, 0.0])
    ours = to_diffusers(plan, DDIM)
    expected = pictures(
        stable_diffusion(), to_diffusers(ss.UniPC(2), DDIM), timesteps=[899, 499, 199], **SMALL, prompt="a"
    )
    again = type(ours).from_config(ours.config)
    for made in (ours, again):
        assert torch.equal(pictures(stable_diffusion(), made, num_inference_steps=3, **SMALL, prompt="a"), expected)
    with pytest.raises(ValueError, match="`num_inference_steps` must be 3, the number of steps of the plan, got 4"):
        ours.set_timesteps(4)
    ours.set_timesteps(3)
    ours.set_begin_index(1)
    with pytest.raises(ValueError, match="cannot start at step 1"):
        ours.step(torch.zeros(1, 2), ours.timesteps[1], torch.ones(1, 2))
    memoryless = to_diffusers(ss.EDMHeun().plan(sde, [900.0, 500.0, 200.0, 0.0]), DDIM)
    memoryless.set_timesteps()
    x, out = torch.ones(1, 2), 0.5 * torch.ones(1, 2)
    fresh = to_diffusers(ss.EDMHeun(), DDIM, grid=lambda sde, n: torch.tensor([500.0, 200.0, 0.0]).double())
    fresh.set_timesteps(2)
    memoryless.set_begin_index(2)
    a = b = x
    for t in fresh.timesteps:
        a, b = memoryless.step(out, t, a).prev_sample, fresh.step(out, t, b).prev_sample
    assert torch.equal(a, b)


def test_a_scheduler_is_kept_with_its_pipeline(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    own, pipe.scheduler = pipe.scheduler, to_diffusers(ss.UniPC(3), pipe.scheduler, grid="karras", seed=3, clip=2.0)
    try:
        pipe.save_pretrained(tmp_path)
        kept = pipe.scheduler
    finally:
        pipe.scheduler = own
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.solver == ss.UniPC(3)
    assert torch.equal(pictures(loaded, loaded.scheduler, **PROMPT), pictures(pipe, kept, **PROMPT))
    alone = type(kept).from_pretrained(tmp_path, subfolder="scheduler")
    assert alone.config == loaded.scheduler.config and alone.solver == kept.solver
    back = diffusers.DDIMScheduler.from_config(kept.config)
    assert back.config.beta_end == own.config.beta_end
    other = type(kept).from_config(diffusers.DPMSolverMultistepScheduler(**LATENT).config, solver="EDMHeun()")
    assert other.solver == ss.EDMHeun()


def test_a_scheduler_is_copied_in_the_middle_of_a_run() -> None:
    made = to_diffusers(ss.SDEDPMSolverPP(2), DDIM)
    made.set_timesteps(4)
    results = []
    x = embeds(2, 3)
    for i, t in enumerate(made.timesteps):
        if i == 2:
            for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
                y = x.clone()
                for s in other.timesteps[2:]:
                    y = other.step(0.1 * y, s, y, generator=torch.Generator().manual_seed(int(s))).prev_sample
                results.append(y)
        x = made.step(0.1 * x, t, x, generator=torch.Generator().manual_seed(int(t))).prev_sample
    assert len(results) == 2 and all(torch.equal(x, y) for y in results)


def test_to_diffusers_of_its_own_result_replaces_the_solver() -> None:
    first = to_diffusers(ss.UniPC(3), DDIM)
    second = to_diffusers(ss.EDMHeun(), first)
    assert second.config.scheduler_class == "DDIMScheduler" and second.solver == ss.EDMHeun()


@pytest.mark.parametrize(
    "theirs", [DDIM, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)], ids=lambda s: type(s).__name__
)
def test_noise_is_added_as_they_add_it(theirs: Any) -> None:
    ours = to_diffusers(ss.DDIM(), theirs)
    x, n = embeds(3, 4), embeds(4, 3).T
    for made in (theirs, ours):
        made.set_timesteps(6)
    t = theirs.timesteps[[0, 2, 5]]
    if hasattr(theirs, "add_noise"):
        torch.testing.assert_close(ours.add_noise(x, n, t), theirs.add_noise(x, n, t))
        torch.testing.assert_close(ours.get_velocity(x, n, t), theirs.get_velocity(x, n, t))
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
        torch.testing.assert_close(ours.sigmas[:-1], (1 / theirs.alphas_cumprod - 1).sqrt()[theirs.timesteps])
    else:
        torch.testing.assert_close(ours.scale_noise(x, t, n), theirs.scale_noise(x, t, n))
        torch.testing.assert_close(ours.get_velocity(x, n, t), n - x)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    assert len(ours) == 1000 and ours.init_noise_sigma == 1.0
    assert torch.equal(ours.scale_model_input(x, t[0]), x)


def test_states_of_half_precision_are_kept_in_float32() -> None:
    """Rounding the state of every step to half precision adds up; rounding what the pipeline sees does not."""
    sde = to_diffusers(ss.DDIM(), DDIM).sde
    model = ss.GaussianMixture(sde, embeds(5, 16), std=0.3)
    ours, start = to_diffusers(ss.DDIM(), DDIM), embeds(4, 16)
    ours.set_timesteps(50)
    x, rounded = start.half(), start.half()
    exact = ss.sample(model, start.half().float(), ss.DDIM(), grid=ours.table.times)
    for t, s in zip(ours.timesteps, ours.table.times[1:].tolist(), strict=True):
        eps = model.eps(x.float(), float(t) + 1)
        x = ours.step(eps.half(), t, x, return_dict=False)[0]
        plan = ss.DDIM().plan(sde, [float(t) + 1, s])
        rounded = ss.plan.run(plan, model.x0, rounded.float()).half()
    assert x.dtype == torch.float16
    assert (x.float() - exact).norm() < 0.7 * (rounded.float() - exact).norm()


def test_a_state_that_the_pipeline_changed_is_used() -> None:
    ours = to_diffusers(ss.DDIM(), DDIM)
    for change in (lambda x: x + 1, lambda x: x.add_(1)):
        results = []
        for dtype in (torch.float32, torch.float16):
            ours.set_timesteps(2)
            x = torch.ones(1, 2, dtype=dtype)
            x = ours.step(torch.zeros_like(x), ours.timesteps[0], x).prev_sample
            results.append(ours.step(torch.zeros_like(x), ours.timesteps[1], change(x)).prev_sample)
        a = [ours.sde.alpha(float(t)) for t in ours.table.times]
        expected = (a[1] / a[0] + 1) * a[2] / a[1]
        for result in results:
            torch.testing.assert_close(result.float(), torch.full((1, 2), expected), rtol=2e-3, atol=0)


@pytest.mark.parametrize("call", ["UniPC(order=3)", "DDIM(eta=0.5)", "with_corrector(DEIS(order=2))", "EDMHeun(2/3)"])
def test_texts_of_solvers(call: str) -> None:
    if "/" in call:
        with pytest.raises(ValueError, match="plain arguments"):
            solver_of(call)
    else:
        assert solver_of(repr(solver_of(call))) == solver_of(call)


SCALED = {"CMStochasticIterative", "KarrasVe", "SCM"}  # whose output is no prediction
TOKENS = {"BlockRefinement", "DiscreteDDIM", "EntropyBound", "Helios", "HeliosDMD", "Piflow"}  # no Gaussian process
NAMES = [n.removesuffix("Scheduler") for n in dir(diffusers) if n.endswith("Scheduler")]
NAMELESS = {"Amused", "RFD4Proteina", "VQDiffusion", "ConsistencyDecoder"}  # no defaults, and refused like the tokens


@pytest.mark.parametrize("kind", [n for n in NAMES if n not in TOKENS | NAMELESS])
def test_every_scheduler_is_replaced_or_refused_with_the_fix(kind: str) -> None:
    theirs = getattr(diffusers, f"{kind}Scheduler")()
    if kind == "PNDM" or "Inverse" in kind:
        theirs.register_to_config(beta_schedule="scaled_linear")
    if kind in SCALED:
        with pytest.raises(ValueError, match="from_diffusers"):
            to_diffusers(ss.DDIM(), theirs)
        return
    ours = to_diffusers(ss.DDIM(), theirs)
    if kind == "RePaint" or "Inverse" in kind:
        with pytest.raises(ValueError, match="encode" if "Inverse" in kind else "repaint"):
            ours.set_timesteps(5)
        ours = to_diffusers(ss.DDIM(), theirs, grid="uniform_lam")
    ours.set_timesteps(5)
    times = ours.table.times
    assert (times.diff() < 0).all() and float(times[-1]) <= ours.sde.t_min
    # MiniMax counts the end as a step; PNDM's last label is its end, where no step is left.
    assert len(ours.timesteps) == len(times) - 1 == (4 if kind in ("MiniMaxH3", "PNDM") else 5)
    assert ours.timesteps.isfinite().all() and float(ours.init_noise_sigma) >= 1


@pytest.mark.parametrize("config", [LEADING, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}])
def test_zero_terminal_snr_and_velocities(config: dict[str, Any]) -> None:
    options = {**PROMPT, "num_inference_steps": 5}  # a divisor of 1000, so that DDIM goes from label to label
    theirs = discrete("DDIM", prediction_type="v_prediction", clip_sample=False, **config)
    ours = to_diffusers(ss.DDIM(), theirs)
    expected = pictures(stable_diffusion(), theirs, **options)
    torch.testing.assert_close(pictures(stable_diffusion(), ours, **options), expected, rtol=0, atol=5e-6)


def test_levels_and_labels_that_the_caller_gives() -> None:
    given = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]  # as pipelines pass them
    ours = to_diffusers(ss.DPMSolverPP(2), discrete("DPMSolverMultistep"))
    ours.set_timesteps(sigmas=given)
    assert len(ours.timesteps) == ours.num_inference_steps == 10
    torch.testing.assert_close(ours.sigmas[1:], torch.tensor(given[1:]), rtol=1e-6, atol=0)
    assert ours.table.times[0] == 1000, "the first level is that of T, rounded up"
    ours.set_timesteps(timesteps=[999, 400, 20])
    assert ours.timesteps.tolist() == [999, 400, 20] and ours.table.end == 0
    flow = to_diffusers(ss.DPMSolverPP(2), FLOW(shift=3.0))
    flow.set_timesteps(timesteps=[1000.0, 400.0, 20.0])
    assert flow.timesteps.tolist() == [1000.0, 400.0, 20.0]
    torch.testing.assert_close(flow.sigmas, torch.tensor([1.0, 0.4, 0.02, 0.0]))


def test_plms_is_that_of_the_first_stable_diffusion() -> None:
    theirs = discrete("PNDM", skip_prk_steps=True, set_alpha_to_one=False, **LEADING)
    ours = to_diffusers(replace(ss.solvers.PLMS(), improved=True), theirs)  # type: ignore[call-arg]
    expected = pictures(stable_diffusion(), theirs, **PROMPT)
    torch.testing.assert_close(pictures(stable_diffusion(), ours, **PROMPT), expected, rtol=0, atol=5e-6)


def test_uneven_steps_do_not_start_in_the_middle() -> None:
    ours = to_diffusers(ss.solvers.Heun(), diffusers.FlowMatchEulerDiscreteScheduler())
    ours.set_timesteps(4)  # the first step, from α = 0, has one evaluation; the others have two
    ours.set_begin_index(1)
    with pytest.raises(ValueError, match="steps with different numbers of evaluations"):
        ours.step(embeds(1, 2), ours.timesteps[1], embeds(1, 2))


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="`scheduler` must be a scheduler of diffusers"):
        to_diffusers(ss.DDIM(), None)
    with pytest.raises(ValueError, match="`solver` must be a call of a function of"):
        solver_of("__import__('os')")
    with pytest.raises(ValueError, match="`grid` must be one of"):
        to_diffusers(ss.DDIM(), DDIM, grid="karas")
    with pytest.raises(ValueError, match="`plan` was written for VP"):
        to_diffusers(ss.DDIM().plan(ss.VP(), [1.0, 0.0]), DDIM)
    ours = to_diffusers(ss.DDIM(), DDIM)
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        ours.step(embeds(1, 2), 1, embeds(1, 2))
    with pytest.raises(ValueError, match="`num_inference_steps` must be given"):
        ours.set_timesteps()
    ours.set_timesteps(3)
    with pytest.raises(ValueError, match="`eta` belongs to the solver"):
        ours.step(embeds(1, 2), ours.timesteps[0], embeds(1, 2), eta=0.5)
    with pytest.raises(ValueError, match="`timestep` must be one of `timesteps`, got 3"):
        ours.step(embeds(1, 2), 3, embeds(1, 2))
    staged = to_diffusers(ss.EDMHeun(), DDIM)
    staged.set_timesteps(3)
    staged.set_begin_index(1)
    with pytest.raises(ValueError, match="cannot start at evaluation 1, in the middle of a step"):
        staged.step(embeds(1, 2), staged.timesteps[1], embeds(1, 2))
    with pytest.raises(ValueError, match="`mu` has no meaning with DDIMScheduler"):
        ours.set_timesteps(3, mu=0.5)
