"""A valid call of every public callable, for `tests/fuzz.py`; what is left out has a reason here."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import scoresde as ss

if TYPE_CHECKING:
    from fuzz import Target

F64 = torch.float64

RESULT = "the library makes this result"
CALLED = "the library calls this, a user writes it"
RECORD = "a record of three or more numbers without rules"

# Callables that are not called: the library makes or calls them, or they have no argument.
REASONS: dict[str, str] = {
    **dict.fromkeys(
        """ExactMoments Order Response Stability Work Diagnosis Kind Solution Particles SolverError Stats
        Accepted Path Step Unrolled Update Transition Elbo Estimate LogProb Comparison Moments Bound
        Independent PrecisionRecall Bits Divergence Record Snapshot Terms Leg Point Stream Independent.sample
        Independent.log_prob Independent.kl CheckpointError Unrolled.state Unrolled.plan Divergence.rows
        Divergence.with_value
        Divergence.products Divergence.standard_error Point.of Point.unbind Path.at Counter Counter.add
        Shared Prior Particles.resampled Frame Problem Captured Profile""".split(),
        RESULT,
    ),
    **dict.fromkeys(
        """Adams.attempt DPMPair.attempt EmbeddedRungeKutta.attempt Scheme.attempt Scheme.rows Equation.slopes
        Equation.rows Equation.weigh Equation.rate Equation.unit Equation.time Equation.size Frame.u Frame.point Frame.t
        Frame.scale Frame.rate Frame.weigh Control.land Control.factor Problem.draw Problem.denoise
        Problem.solution Adaptive.run AdaptiveSDE.run Method.run Reversible.run TorchDiffEq.run TorchSDE.run
        FlowDensity.run LearnedVariance.run Parallel.run LangevinCorrector.bind ReverseSDE.f
        ReverseSDE.g_prod ReverseSDE.forget ReverseSDE.time ReverseSDE.clock Probes.draw Tolerance.control
        Hook.on_start Hook.on_step Hook.on_log Hook.on_save Checkpoints.on_step Preview.on_step
        ProgressBar.on_start ProgressBar.on_step ProgressBar.on_log TensorBoard.on_start TensorBoard.on_log
        Loader.batches Hook.close ProgressBar.close TensorBoard.close Momentum.rows Posterior.leg Start.draw
        Start.normals Start.placement AbstractDenoiser.row_attributes AbstractDenoiser.counted
        AbstractDenoiser.outputs_at Denoiser.outputs_at Given.outputs_at Rescheduled.outputs_at
        ClassifierFree.outputs_at AbstractDenoiser.keeps Denoiser.coefficients Denoiser.check_output
        Plan.program_of Wrapped.counted ClassifierFree.row_attributes ClassifierGuidance.row_attributes
        Compose.row_attributes Measurement.require_likelihood Measurement.require_noise
        EntrywiseMeasurement.require_likelihood EntrywiseMeasurement.require_noise
        Counts.log_density Laplace.log_density StudentT.log_density Laplace.smoothed_density
        StudentT.smoothed_density Rounded.smoothed_density Censored.smoothed_density Measurement.draw Counts.draw
        Laplace.draw StudentT.draw Rounded.draw Censored.draw PNDM.leg Ancestral.leg AnnealedLangevin.leg Churn.leg
        Consistency.leg ExponentialRungeKutta.leg ExtendedReverse.leg Mixed.leg Multistep.leg
        NoiseCombination.leg ReverseSDE.leg RungeKutta.leg SingleStep.leg Solver.leg SongPredictor.leg
        TwoStage.leg GivenDiffusion.leg Preserving.leg
        Multistep.after_noise Solver.after_noise Multistep.moments_of PublishedThree.moments_of
        Multistep.corrected Divergence LossAware.observe Stratified.observe Times.observe
        Stratified.uniforms Times.uniforms Update.factor Split.sizes Gaussian.marginal Gaussian.log_det
        Gaussian.affine HybridVLB.bound Checkpoints.path Checkpoints.save Tape.spans Tape.rows Tape.paste
        Tape.number Tape.numbers Tape.distinct Tape.finite Tape.no_noise Tape.no_signal Tape.between
        Tape.t_of_lam Tape.span Tape.ends BrownianPath.between LossByNoise.add AbstractDenoiser.convert
        SDE.inverse_lam EDM.inverse_lam VE.inverse_lam VP.inverse_lam Cosine.inverse_lam
        Discrete.inverse_lam Flow.inverse_lam SubVP.inverse_lam Trig.inverse_lam Polynomial.inverse_lam
        Shifted.inverse_lam Shifted.base_time expand_conditions Statistics.prediction
        EntryMultistep.leg AnchoredResidual.leg
        AbstractDenoiser.extra_repr swapped Mask.as_output Operator.as_output""".split(),
        CALLED,
    ),
    **dict.fromkeys(
        """SDE Times Times.icdf Times.cdf Times.density Times.sample Hook Method Scheme Pair Equation Solver
        EntrywiseMeasurement EntrywiseMeasurement.log_density EntrywiseMeasurement.smoothed_density
        EntrywiseMeasurement.smoothed EntrywiseMeasurement.log_prob EntrywiseMeasurement.draw
        EntrywiseMeasurement.extra_repr EntrywiseMeasurement.whitened AbstractDenoiser PosteriorDenoiser
        LinearPosteriorDenoiser Wrapped Solver.plan Solver.for_nfe Operator.evaluate AbstractDenoiser.x0
        Operator.rows""".split(),
        "an abstract class; its subclasses are called",
    ),
    "Preconditioning.c_in": "a coefficient of numbers, which `Denoiser` evaluates",
    "derivative": "a tool for processes of one's own: any function, any tensor",
    "save": "writes any object",
    "PowerEMA.swapped": "a context",
    "Restart.for_nfe": "it always raises",
    "linear": "a rule, which guidance calls at every evaluation",
    "Tape.at": "the steps of a solver call this",
    "Row": "a record; the plan that gets it checks it",
    **dict.fromkeys(
        ["LoadError", "Pause", "Paused", "Paused.state_dict", "Gathered", "Gathered.tell", "LoadReport"], RESULT
    ),
    **dict.fromkeys(["Checkpoints.on_start", "Wrapped.x0_and_variance", "Rescheduled.x0_and_variance"], CALLED),
    **dict.fromkeys(["AbstractDenoiser.save", "ClassifierFree.x0_and_variance"], "these models can not do it"),
    **dict.fromkeys(["from_scheduler", "Classifier.forward"], "it needs an object of diffusers, or guidance calls it"),
    **dict.fromkeys(["push_to_hub", "from_pretrained"], "it needs a connection to a hub"),
    **dict.fromkeys(["from_sbi", "sbi_posterior"], "it needs a trained estimator of sbi; tests/interop has one"),
    **dict.fromkeys(
        """Hook.measure Validation.measure Validation.loss Loader.batch_size Checkpoints.check_free EtaWithin.at
        Replacement.bind TensorBoard.images WandB WandB.on_start WandB.on_log WandB.images WandB.close""".split(),
        CALLED,
    ),
    **dict.fromkeys(["Steered", "Steered.mean", "Steered.resampled", "Steered.lineage", "Steered.merged"], RESULT),
    "Potential": "an abstract class; its subclasses are called",
    **dict.fromkeys(
        """Potential.log_value Potential.twist Potential.rows Reward.log_value Reward.twist Reward.rows
        Smoothed.log_value Smoothed.twist Smoothed.rows Composition.exponents Resampling.choose multinomial
        stratified systematic residual effective_size Likelihood.log_value Likelihood.twist
        Likelihood.rows""".split(),
        CALLED,
    ),
    **dict.fromkeys(["Uncertain", "Uncertain.interval", "ReverseSDE.failure"], RESULT),
    **dict.fromkeys(["Rollout", "Transition.kl", "Transition.log_ratio"], RESULT),
    "pauses": "a generator that wants answers; `tell` and `Stepper` are called",
    **dict.fromkeys(
        """Blur.evaluate Blur.transpose Blur.solve FourierMask.evaluate FourierMask.transpose Mask.evaluate
        Mask.transpose Matrix.evaluate Matrix.transpose Matrix.solve Grey.evaluate Grey.transpose
        Downsample.evaluate Downsample.transpose Linear.transpose Linear.solve""".split(),
        "an operator's own arithmetic, without checks; `operator(x)` and `adjoint` check and call this",
    ),
    **dict.fromkeys(
        "Autocast.forward UNet.forward MLP.forward Conditioning.forward Sinusoidal.forward Fourier.forward".split(),
        "a layer, which a denoiser calls at every evaluation, and which is compiled",
    ),
}

# Arguments that are not damaged.
SKIPPED: dict[str, str] = {
    **dict.fromkeys(
        "Plan.meta Tape.move.note Tape.append.note Trainer.accelerator Loader.unpack".split(),
        "any value is valid: it is passed on",
    ),
    **dict.fromkeys(["BrownianPath.normal.s", "BrownianPath.normal.t", "BrownianPath.unit.t"], "a time of any sign"),
    "to_diffusers.grid": "karras is a name of diffusers",
    "TorchDiffEq.method": "torchdiffeq knows its methods, and is imported when it runs",
}

# Annotations that Python cannot evaluate, or that say too little.
ANNOTATIONS: dict[str, Any] = {}


class Net(torch.nn.Module):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Any, **_: Any) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def solution(v: dict[str, Any]) -> ss.Solution:
    """A run with its states."""
    return ss.solve(v["model"], v["x"], steps=2, watch=ss.Watch(save_at="all"))


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


@functools.cache
def file(kind: str) -> Path:
    path = folder() / kind
    if kind == "plan.json":
        ss.DDIM().plan(ss.VP(), [1.0, 0.5]).save(path)
    else:
        ss.training.checkpoint.save(path, {"a": torch.zeros(2)})
    return path


@functools.cache
def values() -> dict[str, Any]:
    """Valid values by the name of an argument."""
    sde = ss.VP()
    model = ss.GaussianMixture(sde, [[-1.0, 0.0], [1.0, 0.0]], std=0.3)
    plan = ss.DDIM().plan(sde, [1.0, 0.5, 0.1])
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=F64)
    net = Net().double()
    measurement = ss.inverse.Measurement(ss.inverse.Mask(torch.tensor([True, False])), x[:1, :1], 0.1)
    return {
        "sde": sde,
        "model": model,
        "plan": plan,
        "x": x,
        "z": x,
        "x0": x,
        "x_t": x,
        "data": x,
        "x_a": x,
        "x_b": x + 1,
        "eps": x.flip(0),
        "t": 0.5,
        "s": 0.2,
        "solver": ss.DDIM(),
        "shape_or_x": (4, 2),
        "shape": (4, 2),
        "steps": 3,
        "nfe": 4,
        "times": [1.0, 0.5, 0.1],
        "grid": [1.0, 0.5, 0.1],
        "lam": 0.3,
        "sigma": 0.4,
        "u": torch.full((4,), 0.3),
        "n": 3,
        "spectrum": [0.5, 1.0],
        "measurement": measurement,
        "index": torch.tensor([0, 2]),
        "y": x + 1,
        "path": file("plan.json"),
        "levels": 4,
        "event": (2,),
        "net": net,
        "std": 0.3,
        "mean": 0.1,
        "want": "eps",
        "noise": ss.Noise(0),
        "draw": 0,
        "step": 3,
        "kind": "linear",
        "weak": model,
        "scale": 1.5,
        "betas": [0.1, 0.2, 0.3],
        "features": 8,
        "module": net,
        "other": model,
        "order": 2,
        "images": torch.randint(0, 4, (4, 2)),
        "predicts": "eps",
        "zeta": 0.5,
        "low": 0.2,
        "high": 0.5,
        "shift": 2.0,
        "null": {"label": 0.0},
        "mask": torch.tensor([True, False]),
        "operator": ss.inverse.Mask(torch.tensor([True, False])),
        "mixture": model,
        "channels": 4,
        "latent": 2,
        "prediction": "eps",
        "folder": folder(),
        "interval": (-1.0, 1.0),
        "denoiser": model,
        "denoise": model.x0,
        "n_times": 3,
        "time": torch.full((4,), 0.5),
        "probes": "exact",
    }


def dsm(v: dict[str, Any]) -> ss.DSM:
    return ss.DSM(ss.Denoiser(v["net"], v["sde"], predicts="eps"))


SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 20,
    "prediction_type": "epsilon",
    "beta_schedule": "linear",
    "beta_start": 1e-3,
    "beta_end": 0.02,
}


def reward() -> ss.steering.Reward:
    return ss.steering.Reward(lambda x: x[:, 0])


def stepper(v: dict[str, Any]) -> Any:
    made = ss.sampling.Stepper(v["plan"], v["x"])
    made.ask()
    return made


@functools.cache
def mlp() -> Path:
    return ss.Denoiser(ss.nn.MLP(2, hidden=8, depth=1), ss.VP(), predicts="eps").save(folder() / "mlp")


def saved(v: dict[str, Any]) -> Path:
    return mlp()


def discrete() -> ss.Discrete:
    return ss.Discrete(ss.processes.betas("linear", 20))


def image_net(v: dict[str, Any]) -> dict[str, Any]:
    return {"x": torch.randn(2, 4, 8, 8), "time": torch.full((2,), 0.5)}


# Arguments of a valid call by target, where they differ from `values`; functions of `values`.
CALLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "convergence_order": lambda v: {"steps": (2, 4), "n": 2, "reference": still},
    "exact_flow": lambda v: {"steps": 4},
    "work_precision": lambda v: {
        "solvers": [ss.DDIM()],
        "nfes": (4,),
        "x": v["x"],
        "truth": v["x"],
        "table": [ss.analysis.Work("DDIM()", "karras", 5, 0.1, 0.2)],  # of the function of `plots`
    },
    "weak_order": lambda v: {"steps": (4, 8)},
    "order_residuals": lambda v: {"plan": ss.UniPC(2).plan(v["sde"], [1.0, 0.7, 0.5, 0.3])},
    "response": lambda v: {"plan": v["plan"], "plans": [v["plan"]]},
    "stability": lambda v: {"plans": [v["plan"]]},
    "Standardize": lambda v: {"mean": torch.zeros(2), "std": torch.ones(2)},
    "align_your_steps": lambda v: {"fine": 6},
    "equal_error": lambda v: {"fine": 6},
    "gits": lambda v: {"fine": 6},
    "estimate_statistics": lambda v: {"n": 4},
    "estimate_entry_statistics": lambda v: {"n": 4},
    "expansion": lambda v: {},
    "fit": lambda v: {"solver": v["plan"], "steps": 1, "shape_or_x": (16, 2)},
    "fit_to_data": lambda v: {
        "nfe": 4,
        "gaussian": v["model"].gaussian,
        "problems": 1,
        "trajectories": 2,
        "steps": 1,
        "predicts": "data",
        "start": "prior",
    },
    "Universal": lambda v: {"predicts": "data", "start": "prior"},
    "Universal.plan": lambda v: {"times": torch.linspace(1, 0, 6, dtype=F64)},
    "index_grid": lambda v: {"sde": discrete()},
    "churn": lambda v: {"s_churn": 0.5},
    "plus_plus": lambda v: {},
    "Compose": lambda v: {"experts": [v["model"]], "weights": [0.5]},
    "ClassifierGuidance": lambda v: {"log_prob": lambda x, t: -x.square().sum(1)},
    "linear": lambda v: {"strong": v["x"], "weak": v["x"] + 1},
    "ClassifierFree.x0": lambda v: {},
    "Control": lambda v: {"rtol": 1e-3, "atol": 1e-3},
    "Reversible.invert": lambda v: {
        "solution": ss.solve(v["model"], v["x"], ss.integrators.Reversible(), steps=3, seed=0),
        "times": None,
    },
    "flow": lambda v: {"s": 0.5, "t": 0.4},
    "integrate": lambda v: {
        "equation": lambda u, y, rows: y,
        "start": 0.0,
        "end": 0.1,
        "scheme": ss.integrators.DormandPrince(),
        "control": ss.integrators.Control(1e-3, 1e-3),
    },
    "from_ddpm": lambda v: {},
    "from_score_sde": lambda v: {"kind": "vp"},
    "Blur": lambda v: {"kernel": torch.ones(3) / 3, "event": (1, 8)},
    "Counts": lambda v: {"y": torch.ones(1, 1)},
    "Measurement": lambda v: {"y": torch.zeros(1, 1), "std": 0.1},
    "Laplace": lambda v: {"y": torch.zeros(1, 1), "scale": 0.1},
    "StudentT": lambda v: {"y": torch.zeros(1, 1), "scale": 0.1},
    "Rounded": lambda v: {"y": torch.zeros(1, 1), "std": 0.1, "step": 0.5},
    "Censored": lambda v: {"y": torch.zeros(1, 1), "std": 0.1},
    "UniformPrior": lambda v: {"low": torch.zeros(2), "high": torch.ones(2)},
    "as_prior": lambda v: {
        "prior": torch.distributions.Independent(torch.distributions.Uniform(-torch.ones(2), torch.ones(2)), 1)
    },
    "TallPosterior": lambda v: {"model": [v["model"]], "observations": None, "prior": v["model"], "method": "jac"},
    "stack": lambda v: {"measurements": [v["measurement"]]},
    "Downsample": lambda v: {"k": 2, "event": (1, 4, 4)},
    "FourierMask": lambda v: {"mask": torch.ones(8, dtype=torch.bool), "event": (1, 8)},
    "Grey": lambda v: {"event": (3, 4, 4)},
    "Linear": lambda v: {"forward": lambda x: 2 * x},
    "Operator": lambda v: {"forward": lambda x: 2 * x},
    "Matrix": lambda v: {"A": torch.eye(2, dtype=F64)},
    "daps": lambda v: {"steps": 1, "grid": 2},
    "ddrm": lambda v: {"grid": 2},
    "red_diff": lambda v: {"grid": 2},
    "twisted_smc": lambda v: {"grid": 2},
    "Likelihood": lambda v: {},
    "MPGD": lambda v: {},
    "steer": lambda v: {"potential": reward(), "solver": ss.DDPM(), "particles": 3, "grid": 2},
    "Reward": lambda v: {"fn": lambda x: x[:, 0]},
    "Smoothed": lambda v: {"potential": reward()},
    "Resampling": lambda v: {},
    "Composition": lambda v: {"models": [v["model"]], "log_density": lambda logs: logs[0]},
    "power": lambda v: {"beta": 2.0},
    "product": lambda v: {"models": [v["model"], v["model"]]},
    "mixture": lambda v: {"models": [v["model"], v["model"]]},
    "sample_composition": lambda v: {
        "composition": ss.steering.power(v["model"], 2.0),
        "grid": 2,
        "particles": 3,
    },
    "Linear.solve": lambda v: {"a": 1.0, "b": 1.0},
    "Blur.solve": lambda v: {"a": 1.0, "b": 1.0},
    "Matrix.solve": lambda v: {"a": 1.0, "b": 1.0},
    "Standardize.fit": lambda v: {},
    "bits_from_nats": lambda v: {"nats": torch.ones(4), "dims": 2, "levels": 4},
    "bits_per_dim": lambda v: {
        "images": torch.arange(8).reshape(4, 2),
        "levels": 8,
        "tolerance": ss.likelihood.Tolerance(steps=2),
    },
    "dequantized_bits": lambda v: {"log_density": lambda x: -x.square().sum(1)},
    "denoiser_error": lambda v: {"exact": v["model"], "ts": [0.5]},
    "jacobian_products": lambda v: {"f": lambda x: 2 * x},
    "path_kl": lambda v: {"n_times": 2},
    "elbo": lambda v: {"grid": [1.0, 0.5, 0.1, 0.01]},
    "c2st": lambda v: {"steps": 2, "folds": 2, "batch": 2, "hidden": 2},
    "compare": lambda v: {"metric": ss.metrics.energy_distance, "n_permutations": 4},
    "sliced_w2": lambda v: {"n_projections": 4},
    "precision_recall": lambda v: {"data": v["x"], "samples": v["y"], "k": 1},
    "ranks": lambda v: {"truth": v["x"], "samples": v["x"][:, None]},
    "ssim": lambda v: {"x": v["x"][..., None], "y": v["y"][..., None], "size": 1},
    "animate": lambda v: {"solution": solution(v), "path": folder() / "run.gif", "seconds": 0.1, "dpi": 20},
    "trajectory": lambda v: {"solution": solution(v)},
    "calibration": lambda v: {"ranks": torch.tensor([0.2, 0.7])},
    "loss_by_noise": lambda v: {"loss": [{"lam": 0.0, "error": 1.0, "count": 1.0, "bad": 0.0}]},
    "orders": lambda v: {"table": ss.analysis.Order(1.0, 1, (2, 4), (0.2, 0.1))},
    "w2_1d": lambda v: {"x": v["x"][:, 0], "y": v["y"][:, 0]},
    "MLP": lambda v: {},
    "Conditioning": lambda v: {"time": ss.nn.Sinusoidal(8), "width": 8},
    "Conditioning.forward": lambda v: {"x": v["x"].float()},
    "MLP.forward": lambda v: {"x": v["x"].float()},
    "UNet": lambda v: {"width": 8, "multipliers": (1,), "attention": (), "blocks": 1, "heads": 1},
    "UNet.forward": image_net,
    "VAE": lambda v: {"width": 8, "multipliers": (1,), "blocks": 1},
    "VAE.latent_shape": lambda v: {"shape": (2, 4, 8, 8)},
    "VAE.sample": lambda v: {"shape": (2, 4, 8, 8)},
    "VAE.encode": image_net,
    "VAE.forward": image_net,
    "VAE.elbo": image_net,
    "VAE.importance_bound": lambda v: {**image_net(v), "samples": 2},
    "VAE.decode": lambda v: {"z": torch.randn(2, 2, 8, 8)},
    "VAE.likelihood": lambda v: {"z": torch.randn(2, 2, 8, 8)},
    "Noise.normals": lambda v: {"draws": torch.arange(3)},
    "Noise.fork": lambda v: {"stream": 1},
    "BrownianPath.normal": lambda v: {"s": 0.1, "t": 0.5},
    "Span": lambda v: {"start": 1.0, "end": 0.5, "path": "data"},
    "Row": lambda v: {},
    "Plan": lambda v: {"rows": v["plan"].rows},
    "Plan.join": lambda v: {"other": ss.DDIM().plan(v["sde"], [0.1, 0.05])},
    "Plan.from_dict": lambda v: {"table": v["plan"].to_dict()},
    "Plan.save": lambda v: {"path": folder() / "saved.json"},
    "updates": lambda v: {},
    "FromDrift": lambda v: {"f_fn": lambda t: -0.05 - 9.95 * t, "g_fn": lambda t: (0.1 + 19.9 * t).sqrt()},
    "FromFunctions": lambda v: {"alpha_fn": lambda t: 1 - t, "sigma_fn": lambda t: t},
    "SDE.from_functions": lambda v: {"alpha": lambda t: 1 - t, "sigma": lambda t: t},
    "SDE.from_drift": lambda v: {"f": lambda t: -0.05 - 9.95 * t, "g": lambda t: (0.1 + 19.9 * t).sqrt()},
    "Shifted": lambda v: {"base": ss.Flow()},
    "betas": lambda v: {"N": 20},
    "SDE.transition": lambda v: {},
    "SDE.posterior": lambda v: {},
    "Discrete.t_of_index": lambda v: {"index": 3},
    **{
        f"Discrete.{n}": (lambda v: {"t": 3})
        for n in "alpha_bar beta posterior_variance posterior_mean q_step q_sample".split()
    },
    "interpolate": lambda v: {"steps": 3},
    "langevin": lambda v: {"step": 0.01, "n": 1},
    "sample": lambda v: {"steps": 3, "seed": 0},
    "solve": lambda v: {"steps": 3, "seed": 0},
    "encode": lambda v: {"steps": 3},
    "decode": lambda v: {"steps": 3},
    "plan_for": lambda v: {"steps": 3},
    "Recommendation": lambda v: {"solver": ss.DDIM(), "grid": ss.grids.karras, "why": "It is simple."},
    "Autocast": lambda v: {"net": torch.nn.Identity()},
    "capture": lambda v: {"shape": tuple(v["x"].shape), "steps": 2},
    "profile": lambda v: {"shape": tuple(v["x"].shape), "steps": 2, "repeats": 1},
    "log_prob": lambda v: {"tolerance": ss.likelihood.Tolerance(steps=2)},
    "slerp": lambda v: {"a": v["x"], "b": v["x"] + 1, "w": 0.5},
    "check_denoiser": lambda v: {"model": ss.Denoiser(v["model"].eps, v["sde"], predicts="eps")},
    "Churn": lambda v: {"s_churn": 1.0},
    "AnchoredResidual": lambda v: {"std": 0.5},
    "residual_prediction": lambda v: {"std": 0.5},
    "EntryStatistics": lambda v: entry_tables(),
    "EntryStatistics.mean": lambda v: {},
    "EntryMultistep": lambda v: {"statistics": ss.solvers.EntryStatistics(**entry_tables()), "corrector": 4},
    "load_statistics": lambda v: {"folder": published_tables(), "sde": v["sde"]},
    "DPMSolverV3": lambda v: {"statistics": statistics(v)},
    "ExponentialTableau": lambda v: {"c": ss.solvers.KROGSTAD4.c, "a": ss.solvers.KROGSTAD4.a, "order": 4, "name": "K"},
    "Tableau": lambda v: {"a": ((0.5,),), "b": (0.0, 1.0)},
    "ExtendedReverse": lambda v: {"nodes": 2, "phi": lambda x: x},
    "Mixed": lambda v: {"orders": (1, 2, 3)},
    "Prediction": lambda v: {
        n: getattr(ss.solvers.NOISE, n) for n in "name scale p q clock lam_of_clock slope".split()
    },
    "Variable": lambda v: {"name": "lam", "of": lambda t, lam: lam},
    "Statistics": lambda v: {"lam": (-1.0, 0.0, 1.0), "l": (0.0,) * 3, "s": (0.0,) * 3, "b": (0.0,) * 3},
    "edm_prediction": lambda v: {"sigma_data": 0.5},
    "DEISRungeKutta": lambda v: {},
    "with_corrector": lambda v: {"solver": ss.solvers.Multistep(2)},
    "restart": lambda v: {"times": [1.0, 0.7, 0.4, 0.1], "low": 0.4, "high": 0.7},
    "Restart": lambda v: {"low": 0.4, "high": 0.7},
    "Restart.plan": lambda v: {"times": [1.0, 0.7, 0.4, 0.1]},
    "Mixed.plan": lambda v: {"times": [1.0, 0.7, 0.4, 0.1]},
    "Tape": lambda v: {"t": 1.0},
    "Tape.time": lambda v: {"row": 0},
    "Tape.at": lambda v: {"t": 0.5},
    "Tape.draw": lambda v: {},
    "Tape.move": lambda v: {"source": 0, "t": 0.5, "nodes": [0]},
    "Tape.diffuse": lambda v: {"source": 0, "t": 1.0},
    "Tape.append": lambda v: {"t": 0.5, "x": [(0, 1.0)]},
    "Trainer": lambda v: {"loss": dsm(v), "batch": 4},
    "Trainer.fit": lambda v: {"steps": 1},
    "Trainer.load_state_dict": lambda v: {"state": trainer(v).state_dict()},
    "EMA.load_state_dict": lambda v: {"state": ss.EMA(v["net"]).state_dict()},
    "PowerEMA.load_state_dict": lambda v: {"state": ss.training.PowerEMA(v["net"]).state_dict()},
    "DSM": lambda v: {"model": ss.Denoiser(v["net"], v["sde"], predicts="eps")},
    "DSM.at": lambda v: {"t": torch.full((4,), 0.5, dtype=F64)},
    "HybridVLB": lambda v: {"model": learned(v)},
    "HybridVLB.at": lambda v: {"t": torch.full((4,), 0.5, dtype=F64)},
    "LossByNoise": lambda v: {},
    "Preview": lambda v: {"function": lambda net, step: None},
    "Loader": lambda v: {},
    "drop_condition": lambda v: {"cond": {"label": torch.ones(4)}, "p": 0.5},
    "reconstruct": lambda v: {"snapshots": power(v), "std": 0.07},
    "sliced_score_matching": lambda v: {"score": lambda x: -x},
    "Steps": lambda v: {"N": 10},
    **{
        f"{c}.{m}": (lambda v: {"t": torch.full((4,), 0.5)})
        for c in "Steps LogNormalSigma LikelihoodImportance LossAware Stratified".split()
        for m in ("cdf", "density")
    },
    "sensitivity": lambda v: {"t": torch.full((4,), 0.5)},
    "likelihood": lambda v: {"t": torch.full((4,), 0.5)},
    "Uncertainty.log_loss": lambda v: {"t": torch.full((4,), 0.5)},
    "Uncertainty.forward": lambda v: {"loss": torch.ones(4), "t": torch.full((4,), 0.5)},
    "named": lambda v: {"name": "simple"},
    "Empirical": lambda v: {},
    "GaussianMixture": lambda v: {"means": [[0.0, 1.0]], "std": 0.5},
    "Gaussian": lambda v: {"mean": torch.zeros(2, dtype=F64), "spectrum": torch.ones(2, dtype=F64)},
    "Gaussian.of": lambda v: {"mean": torch.zeros(2, dtype=F64), "cov": torch.eye(2, dtype=F64)},
    "Gaussian.skip_errors": lambda v: {"points": 3, "n": 4},
    "Gaussian.start_time": lambda v: {"points": 3, "n": 4},
    "Gaussian.flow": lambda v: {"s": 0.5, "t": 0.2},
    "GaussianMixture.flow": lambda v: {"s": 0.5, "t": 0.4},
    "GaussianMixture.log_prob": lambda v: {},
    "GaussianMixture.sample": lambda v: {"n": 3},
    "dps_scale": lambda v: {},
    "gaussian_grid": lambda v: {"steps": 3},
    "run": lambda v: {},
    "steps": lambda v: {},
    "Prior.sample": lambda v: {},
    "from_flow": lambda v: {},
    "from_edm": lambda v: {},
    "suggest_sigma_max": lambda v: {},
    "check_scale": lambda v: {},
    "window": lambda v: {},
    "repaint": lambda v: {"jump": 1, "resample": 2},
    "Fourier.forward": lambda v: {"time": torch.full((4,), 0.5)},
    "LossAware": lambda v: {},
    "Stratified": lambda v: {},
    "EMA": lambda v: {},
    "NoiseLevels": lambda v: {"levels": [10.0, 1.0, 0.1]},
    "from_sigmas": lambda v: {"sde": ss.EDM(), "sigmas": [10.0, 1.0, 0.1]},
    "published": lambda v: {"name": "ays-sd15"},
    "Classifier": lambda v: {"sde": discrete()},
    "load_weights": lambda v: {"net": Net(), "weights": Net().state_dict()},
    "renamed": lambda v: {"names": {"a": "b"}},
    "respaced": lambda v: {"sde": discrete(), "timestep_respacing": [5]},
    "with_prefix": lambda v: {"prefix": "a."},
    "without_prefix": lambda v: {"prefix": "a."},
    "student_quantile": lambda v: {"probability": 0.9, "degrees": 3.0},
    "to_diffusers": lambda v: {"scheduler": SCHEDULER},
    "gaussian_stds": lambda v: {"stds": [1.0, 2.0]},
    "log_variance": lambda v: {"kind": "range", "output": v["x"], "small": v["x"], "large": v["x"] + 1},
    "from_diffusers": lambda v: {"scheduler": SCHEDULER},
    "sde_from_diffusers": lambda v: {"scheduler": SCHEDULER},
    "model_card": lambda v: {"model": ss.Denoiser(v["net"], v["sde"], predicts="eps"), "name": "a"},
    "pull_back": lambda v: {"gains": [1.0] * v["plan"].nfe},
    "resume": lambda v: {"state": ss.plan.begin(v["plan"], v["x"]).state_dict()},
    "tell": lambda v: {"run": ss.plan.begin(v["plan"], v["x"]), "x0": v["x"]},
    "gather": lambda v: {"steppers": [stepper(v)]},
    "Stepper.tell": lambda v: {"output": v["x"]},
    "Stepper.load_state_dict": lambda v: {"state": stepper(v).state_dict()},
    "SDE.from_dict": lambda v: {"table": v["sde"].to_dict()},
    "Solver.from_dict": lambda v: {"table": v["solver"].to_dict()},
    "Denoiser.save": lambda v: {
        "folder": folder() / "model",
        "overwrite": True,
        "build": {"class": "torch.nn:Linear", "arguments": {}},
    },
    "load": lambda v: {"folder": saved(v), "path": file("state")},
    "Preserving": lambda v: {"noise_level": 0.5},
    "ReverseEuler": lambda v: {"diffusion": lambda t: t},
    "rollout": lambda v: {"solver": ss.DDPM(), "steps": None},
    "replay": lambda v: {"rollout": rollout(v), "rows": [1]},
    "minibatches": lambda v: {"rollout": rollout(v), "rows": 1},
    "Rollout.at": lambda v: {"rows": [1]},
    "advantages": lambda v: {"rewards": v["x"][:, 0]},
    "reward_to_go": lambda v: {"rewards": v["x"][:, 0], "kl": torch.ones(2, 4), "beta": 0.1},
    "log_ratio": lambda v: {"new": rollout(v).at(), "old": rollout(v).at()},
    "step_kl": lambda v: {"new": rollout(v).at(), "reference": rollout(v).at()},
    "grpo_loss": lambda v: {"log_ratio": v["x"].mT, "advantages": v["x"][:, 0]},
    "optimality": lambda v: {"advantages": v["x"][:, 0], "limit": 2.0},
    "nft_loss": lambda v: {"old": v["model"], "t": torch.full((4,), 0.5), "reward": torch.full((4,), 0.5)},
    "dpo_loss": lambda v: {
        "reference": v["model"],
        "chosen": v["x"],
        "rejected": v["x"] + 1,
        "t": torch.full((4,), 0.5),
        "strength": 1.0,
    },
    "tilted": lambda v: {},
    "start_share": lambda v: {},
    "EmbeddedRungeKutta": lambda v: {
        n: getattr(ss.integrators.DormandPrince(), n) for n in "a error of_order middle".split()
    },
}


def statistics(v: dict[str, Any]) -> Any:
    return ss.solvers.Statistics((-5.0, 0.0, 5.0), (0.0,) * 3, (0.0,) * 3, (0.0,) * 3)


def rollout(v: dict[str, Any]) -> Any:
    return ss.policies.rollout(v["model"], (4, 2), ss.DDPM(), grid=[1.0, 0.5, 0.1], seed=0)


def entry_tables() -> dict[str, Tensor]:
    """Tables for states of two entries."""
    return {"lam": torch.linspace(-5, 5, 3, dtype=F64), **{k: torch.zeros(3, 2, dtype=F64) for k in "lsb"}}


@functools.cache
def published_tables() -> str:
    """A folder with tables in the format of DPM-Solver-v3's public code."""
    folder = Path(tempfile.mkdtemp())
    zero = np.zeros((3, 2))
    np.savez(folder / "l.npz", l=zero)
    np.savez(folder / "sb.npz", s=zero, b=zero)
    return str(folder)


def still(x: Tensor, *times: float) -> Tensor:
    """The flow of a process without drift, for functions that want a reference."""
    return x


def learned(v: dict[str, Any]) -> ss.Denoiser:
    return ss.Denoiser(lambda x, t: torch.cat([x, x], 1), discrete(), predicts="eps", learned_variance=True)


def power(v: dict[str, Any]) -> Any:
    ema = ss.training.PowerEMA(Net())
    out = []
    for _ in range(3):
        ema.update()
        out += ema.snapshot()
    return out


def trainer(v: dict[str, Any]) -> ss.Trainer:
    return ss.Trainer(dsm(v), v["data"], batch=4, folder=tempfile.mkdtemp(dir=folder()), hooks=())


# The object whose methods are called, where the class itself is abstract or needs more than `CALLS` says.
OBJECTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "Stepper": stepper,
    "Rollout": rollout,
    "AbstractDenoiser": lambda v: v["model"],
    "Denoiser": lambda v: ss.Denoiser(v["net"], v["sde"], predicts="eps"),
    "Given": lambda v: v["model"].given(),
    "ClassifierFree": lambda v: ss.ClassifierFree(v["model"], 1.5, null={"label": 0.0}).given(label=torch.ones(4)),
    "SDE": lambda v: v["sde"],
    "Discrete": lambda v: discrete(),
    "Trainer": trainer,
    "Times": lambda v: ss.training.times.Uniform(),
    "Solver": lambda v: ss.UniPC(2),
    "PNDM": lambda v: ss.solvers.PNDM(),
    "Checkpoints": lambda v: ss.training.Checkpoints(folder()),
    "Counts": lambda v: ss.inverse.Counts(v["operator"], torch.ones(1, 1)),
    "Linear": lambda v: ss.inverse.Linear(lambda x: 2 * x, (2,)),
    "Operator": lambda v: v["operator"],
    "Prior": lambda v: v["sde"].prior(),
    "Plan": lambda v: v["plan"],
    "Denoiser.x0_and_variance": lambda v: learned(v),
    "AbstractDenoiser.x0_and_variance": lambda v: learned(v),
    "Given.x0_and_variance": lambda v: learned(v).given(),
    "BrownianPath": lambda v: ss.noise.BrownianPath(ss.Noise(0), (4, 2)),
    "Replacement": lambda v: ss.inverse.Replacement(v["sde"], v["measurement"]),
    "ExponentialRungeKutta": lambda v: ss.solvers.ExponentialRungeKutta(),
    "Tape": lambda v: ss.solvers.Tape(v["sde"], 1.0),
    "TorchSDE": lambda v: ss.integrators.TorchSDE(),
    "Compose": lambda v: ss.guidance.Compose(v["model"], [v["model"]], [0.5]),
    "Loader": lambda v: ss.training.Loader(v["data"]),
    "MLP": lambda v: ss.nn.MLP(2),
    "Conditioning": lambda v: ss.nn.Conditioning(ss.nn.Sinusoidal(8), 8),
}

INPUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Blur": lambda v: {"x": torch.ones(2, 1, 8, dtype=F64), "y": torch.ones(2, 1, 8, dtype=F64)},
    "FourierMask": lambda v: {"x": torch.ones(2, 1, 8, dtype=F64), "y": torch.ones(2, 1, 8, 2, dtype=F64)},
    "Downsample": lambda v: {"x": torch.ones(2, 1, 4, 4), "y": torch.ones(2, 1, 2, 2)},
    "Grey": lambda v: {"x": torch.ones(2, 3, 4, 4), "y": torch.ones(2, 1, 4, 4)},
    "Mask": lambda v: {"y": torch.ones(2, 1)},
}


def valid_call(target: Target, v: dict[str, Any], constructor: bool = False) -> dict[str, Any]:
    """Arguments of a valid call of a target: those without a default, and those of `CALLS`."""
    given = CALLS.get(target.name, lambda v: {})(v)
    if target.owner is not None:
        given = {**INPUTS.get(target.name.split(".")[0], lambda v: {})(v), **given}
    out = {}
    for name, p in target.parameters.items():
        if name in given:
            out[name] = given[name]
        elif p.default is p.empty:
            out[name] = v[name]
    return out


def bound(target: Target, v: dict[str, Any]) -> Callable[..., Any]:
    """The callable, bound to an object if it is a method."""
    if target.owner is None or not target.is_method:
        return target.call
    cls, method = target.name.rsplit(".", 1)
    make = OBJECTS.get(target.name) or OBJECTS.get(cls)
    if make is not None:
        return getattr(make(v), method)  # type: ignore[no-any-return]
    from fuzz import Target

    owner = Target(target.folder, cls, target.owner)
    return getattr(target.owner(**valid_call(owner, v)), method)  # type: ignore[no-any-return]


def invoke(target: Target, kwargs: dict[str, Any], v: dict[str, Any]) -> Any:
    """Call a target. Positional-only arguments are passed by position."""
    call = bound(target, v)
    positional = [n for n, p in target.parameters.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    kwargs = dict(kwargs)
    return call(*[kwargs.pop(n) for n in positional if n in kwargs], **kwargs)
