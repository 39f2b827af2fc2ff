"""Names of solvers and grids in other libraries and in other spellings, for the hints of errors.

:func:`meant` returns our name for theirs: for the classes of diffusers' schedulers, the functions of k-diffusion, and
our own names in any case. ``docs/schedulers.md`` has the comparisons behind the pairs.
"""

from __future__ import annotations

# Solvers at the top of the package, those in `ss.solvers` that need no argument, and names of grid makers.
TOP = "DDIM DDPM DPMSolverPP EDMHeun EulerMaruyama SDEDPMSolverPP UniPC VelocityAB Adaptive"
SOLVERS = (
    "CPS DEIS DPM2 DPMPPSDE ERSDE ETDRK4 IPNDM LMS PLMS PNDM RES SEEDS AcceleratedDDIM Ancestral AnnealedLangevin "
    "Consistency ConsistencySampling DEISRungeKutta DPM2Ancestral DPMPP2SAncestral DPMSolver EDMStochastic "
    "EulerAncestral ExponentialRungeKutta FlowSDE Midpoint Multistep NoiseCombination Posterior "
    "ReverseDiffusion ReverseSDE RungeKutta RungeKutta4 SASolver SDEDPMSolver SingleStep SongPredictor StochasticHeun "
    "TwoStage Universal"
)
GRIDS = (
    "karras exponential polyexponential cosine power_t quadratic_vp uniform_t uniform_lam log_noise flow_time "
    "beta_quantile"
)

# Words of others, without "Scheduler", "sample_" and underscores, in small letters; " or " parts two answers.
ELSEWHERE = {
    "ddimparallel cogvideoxddim": "ss.DDIM()",
    "edmeuler flowmatcheuler flowmatcheulerdiscrete eulerdiscrete flowmapeulerdiscrete tcd": "ss.DDIM()",
    "euler": "ss.DDIM() or ss.solvers.Euler()",
    "ddpmparallel": "ss.DDPM()",
    "heundiscrete": "ss.EDMHeun()",
    "heun edm": "ss.EDMHeun() or ss.solvers.Heun()",
    "flowmatchheundiscrete": "ss.solvers.RungeKutta(prediction=ss.solvers.VELOCITY)",
    "deismultistep": "ss.solvers.DEIS(2, 'lam')",
    "dpmsolver++ dpmsolvermultistep dpmpp2m dpm++ dpm++2m edmdpmsolvermultistep": "ss.DPMSolverPP(2)",
    "dpmsolversinglestep dpmpp2s dpm++2s": "ss.DPMSolverPP(2, kind='single')",
    "dpmsolversde dpmppsde dpm++sde": "ss.solvers.DPMPPSDE()",
    "cosinedpmsolvermultistep dpmpp2msde dpm++2msde": "ss.SDEDPMSolverPP(2)",
    "dpmpp3msde dpm++3msde": "ss.SDEDPMSolverPP(3, form='published')",
    "dpmpp2sancestral dpm++2sancestral dpmpp2sa": "ss.solvers.DPMPP2SAncestral()",
    "eulerancestraldiscrete eulera": "ss.solvers.EulerAncestral()",
    "kdpm2discrete kdpm2": "ss.solvers.DPM2()",
    "kdpm2ancestraldiscrete kdpm2ancestral dpm2a": "ss.solvers.DPM2Ancestral()",
    "lmsdiscrete": "ss.solvers.LMS(4)",
    "unipcmultistep": "ss.UniPC(2)",
    "dpmfast": "ss.solvers.DPMSolver()",
    "dpmadaptive rk45 dopri5 odeint adaptive": "ss.Adaptive()",
    "lcm flowmatchlcm": "ss.solvers.ConsistencySampling()",
    "ab velocity": "ss.VelocityAB()",
    "em eulermaruyama": "ss.EulerMaruyama()",
    "pc predictorcorrector": "ss.solvers.ReverseDiffusion()",
    "rk4": "ss.solvers.RungeKutta4()",
}
GRIDS_ELSEWHERE = {
    "edm": "ss.grids.karras",
    "beta": "ss.grids.beta_quantile",
    "linear uniform linspace": "ss.grids.uniform_t",
    "quadratic quad": "ss.grids.quadratic_vp",
    "logsnr lam lambda": "ss.grids.uniform_lam",
}


def meant(name: str) -> str | None:
    """Code for the solver that a name means, such as ``"ss.DDIM()"`` for ``"DDIMScheduler"``; None if it means none.

    Arguments:
        name: Name of a class or function of another library, or one of ours in another spelling.
    """
    plain = _plain(name).removeprefix("sample").removesuffix("scheduler")
    ours = {_plain(known): f"ss.{known}()" for known in TOP.split()}
    ours |= {_plain(known): f"ss.solvers.{known}()" for known in SOLVERS.split()}
    return (ours | _spread(ELSEWHERE)).get(plain)


def meant_by(value: object) -> str | None:
    """Code for the solver that a text, or a class, an object or a function of another library means, or None.

    Arguments:
        value: Value that is no solver.
    """
    if isinstance(value, str):
        return meant(value)
    if str(getattr(value, "__module__", "")).partition(".")[0] == "scoresde":
        return None
    return meant(str(getattr(value, "__name__", type(value).__name__)))


def meant_grid(name: str) -> str | None:
    """Grid maker that a name means, such as ``"ss.grids.karras"`` for ``"Karras"``; None if it means none.

    Arguments:
        name: Name of a grid.
    """
    plain = _plain(name)
    return ({_plain(known): f"ss.grids.{known}" for known in GRIDS.split()} | _spread(GRIDS_ELSEWHERE)).get(plain)


def hint(answer: str | None) -> str:
    """End of an error that suggests an answer; empty without one.

    Arguments:
        answer: Output of :func:`meant` or :func:`meant_grid`.
    """
    return "" if answer is None else f"; did you mean {answer}?"


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c == "+")


def _spread(table: dict[str, str]) -> dict[str, str]:
    return {name: answer for names, answer in table.items() for name in names.split()}
