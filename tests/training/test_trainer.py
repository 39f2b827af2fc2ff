"""The trainer: one run, however it is interrupted, cut into parts, or split over processes."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde.training import (
    Checkpoints,
    Hook,
    Loader,
    Preview,
    ProgressBar,
    Record,
    TensorBoard,
    Update,
    Validation,
    checkpoint,
    times,
    weightings,
)
from scoresde.training.data_order import DataOrder, batches, parts, size, stream
from scoresde.training.draws import Draws
from scoresde.training.ema import PowerEMA
from scoresde.training.trainer import Trainer

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state for each process of the system; every test here is a new process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0, norm: bool = False, width: int = 32) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(3, width), middle, nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        out = self.layers(torch.cat([x, t[:, None]], dim=1))
        return out if label is None else out + label[:, None].to(out)


DATA = ss.Noise(0).normal((100, 2), 0)


def make(init: int = 0, data: Any = DATA, net: dict[str, Any] | None = None, **options: Any) -> Trainer:
    torch.manual_seed(init)
    model = ss.Denoiser(Net(**(net or {})), ss.VP(), predicts="eps")
    loss = options.pop("loss", ss.DSM)(model)
    return Trainer(loss, data, **{"batch": 16, "log_every": 1, **options})


def rich(model: ss.Denoiser) -> ss.DSM:
    """Everything that has a state: learned weights, learned times, and conditions that are dropped at random."""
    learned = times.Stratified(times.LossAware(bins=4, warmup=2))
    return ss.DSM(model, weightings.Uncertainty("simple"), proposal=learned, drop=0.3, null={"label": -1})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.history]


# One run.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_halves_with_a_restart_are_the_whole_to_the_bit(tmp_path: Path, accumulate: int) -> None:
    data = {"x": DATA, "label": torch.arange(100) % 3}
    options = {"data": data, "loss": rich, "net": {"dropout": 0.2, "norm": True}, "ema": 0.99}
    options |= {"update": Update(accumulate=accumulate, warmup=5, schedule=lambda step: 0.99**step)}
    whole = make(0, **options)
    whole.fit(24)
    first = make(0, **options, folder=tmp_path)
    first.fit(12)
    second = make(77, **options, folder=tmp_path)  # other weights, other generators: all must be forgotten
    assert second.resume() and second.step == 12
    second.fit(24)
    assert losses(first) + losses(second) == losses(whole)
    a, b = whole.state_dict(), second.state_dict()
    for part in a:
        if part != "rng":
            assert same(a[part], b[part]), part
    assert same(a["rng"][0]["torch"], b["rng"][0]["torch"])
    assert any("balance" in name for name in a["loss"]) and any("learned_times" in name for name in a["loss"])
    assert len(set(losses(whole))) == 24


def test_a_power_average_and_a_data_set_resume_too(tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, i: int) -> Tensor:
            return DATA[i] + 0.1 * torch.randn(2)  # a random transform, in this process

    def one(init: int, folder: Path | None = None) -> Trainer:
        trainer = make(init, data=Rows(), ema=None, folder=folder)
        trainer.ema = PowerEMA(trainer.model)
        return trainer

    whole = one(0)
    whole.fit(8)
    one(0, tmp_path).fit(4)
    second = one(5, tmp_path)
    second.resume()
    second.fit(8)
    assert same(whole.state_dict()["ema"], second.state_dict()["ema"])
    assert losses(second) == losses(whole)[4:]


def test_parts_are_the_whole_batch_to_rounding() -> None:
    runs = {k: make(0, batch=24, update=Update(accumulate=k), ema=0.9) for k in (1, 2, 3)}
    for trainer in runs.values():
        trainer.fit(5)
    for k in (2, 3):
        assert losses(runs[k]) == pytest.approx(losses(runs[1]), rel=1e-5)
        for p, q in zip(runs[1].loss.parameters(), runs[k].loss.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-6)


RANK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import scoresde as ss
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from scoresde.training import Checkpoints, Preview, Update, Validation, times
from test_trainer import DATA, make

accelerator = None
if {sharded}:  # accelerate shards on devices only, and on a CPU only with these settings
    plugin = FullyShardedDataParallelPlugin()  # with the launcher's variables
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
rank = int(os.environ["RANK"])  # only the first process' weights may count
seen = []
options = dict(batch=24, update=Update(accumulate=2), loss=lambda model: ss.DSM(model, times=times.Stratified()))
preview = Preview(lambda model, step: seen.append(model.x0(torch.ones(2, 2), 0.5)), every=2)
hooks = [Checkpoints({folder!r}, every=3), preview, Validation(DATA[:50], every=3, batch=12)]
trainer = make(rank, ema=0.9, accelerator=accelerator, hooks=hooks, **options)
assert trainer.world == 2
trainer.fit(3)
if rank == 0:
    open({folder!r} + ".txt", "w").write(str(trainer.history[-1]["validation"]))
assert len(seen) == (rank == 0) and all(x.isfinite().all() for x in seen)
assert all(hasattr(p, "full_tensor") == {sharded} for p in trainer.loss.parameters())
again = make(9 + rank, ema=0.9, accelerator=trainer.accelerator, hooks=[Checkpoints({folder!r}, 100)], **options)
assert again.resume()
again.fit(5)
"""

LAUNCHERS = {
    "torchrun": ("torch.distributed.run --nproc_per_node 2 --master_port", False),
    "accelerate launch with FSDP": (
        "accelerate.commands.launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy SIZE_BASED_WRAP "
        "--fsdp_min_num_params 60 --num_processes 2 --main_process_port",
        True,
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_are_one_to_rounding(launcher: str, tmp_path: Path) -> None:
    options, sharded = LAUNCHERS[launcher]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "script.py"
    script.write_text(RANK.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"), sharded=sharded))
    command = [sys.executable, "-m", *options.split(), port, str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ss.__file__).parents[1])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as two:
        stratified = lambda model: ss.DSM(model, times=times.Stratified())  # noqa: E731
        one = make(0, batch=24, update=Update(accumulate=2), ema=0.9, loss=stratified)
        one.fit(3)
        validated = Validation(DATA[:50], batch=12).loss(one)
        one.fit(5)
        try:
            errors = two.communicate(timeout=120)[1]
        finally:
            two.kill()
    assert two.returncode == 0, errors
    assert float((tmp_path / "run.txt").read_text()) == pytest.approx(validated, rel=1e-5)
    newest = Checkpoints(tmp_path / "run").latest()
    assert newest is not None and newest[0] == 5 and len(newest[1]["rng"]) == 2
    state = one.state_dict()
    mine = [state["loss"], state["ema"]["weights"], *state["optimiser"]["state"].values()]
    theirs = [newest[1]["loss"], newest[1]["ema"]["weights"], *newest[1]["optimiser"]["state"].values()]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, w in a.items():
            assert torch.allclose(b[name], w, atol=1e-6), name


def test_weights_are_sharded_by_fsdp_2_or_not_at_all() -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match=r"must be version 2.*--fsdp_version 2"):
        make(accelerator=accelerator)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_ends_where_it_would_have() -> None:
    script = Path(__file__).parents[2] / "experiments" / "kill_resume.py"
    done = subprocess.run([sys.executable, str(script), "--kills", "8"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "False" not in done.stdout
    for words in ("one writer, 8 kills", "two writers, 8 kills", "0 writers that crashed", "the run ended after step"):
        assert words in done.stdout


# Data order.


def test_epochs_are_permutations_laid_end_to_end() -> None:
    order = DataOrder(10, 4, seed=3)
    line = torch.cat([order.rows(step) for step in range(10)])
    for epoch in range(4):
        assert sorted(line[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert not torch.equal(line[:10], line[10:20])
    assert torch.equal(DataOrder(10, 4, seed=3).rows(7), order.rows(7)), "any step at once"
    assert not torch.equal(DataOrder(10, 4, seed=4).rows(7), order.rows(7))
    assert DataOrder(3, 8, seed=0).rows(0).bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_parts_of_all_processes_make_up_the_batch() -> None:
    order = DataOrder(50, 12, seed=0)
    took = [parts(order, 5, rank, 3, 2) for rank in range(3)]
    for step in (5, 6):
        rows = [[next(mine) for mine in took] for _ in range(2)]
        assert torch.equal(torch.cat([row for part in rows for row in part]), order.rows(step))


def test_data_come_as_tensors_by_name_or_data_sets() -> None:
    index = torch.tensor([4, 2])
    pairs = torch.utils.data.TensorDataset(DATA, torch.arange(100))
    assert torch.equal(next(batches(DATA, iter([index]))), DATA[index])
    named = next(batches({"x": DATA, "label": torch.arange(100)}, iter([index])))
    assert torch.equal(named["x"], DATA[index]) and named["label"].tolist() == [4, 2]
    state = torch.get_rng_state()
    x, label = next(batches(pairs, iter([index])))
    assert torch.equal(x, DATA[index]) and label.tolist() == [4, 2]
    assert torch.equal(torch.get_rng_state(), state), "a data set's loader takes nothing from the global generator"
    assert size(pairs) == size(DATA) == 100
    trainer = make(data=Loader(pairs, unpack=lambda batch: (batch[0], {"label": batch[1]})))
    trainer.fit(2)
    with pytest.raises(TypeError, match="a stream cannot be resumed"):
        size(iter([1]))
    with pytest.raises(ValueError, match="one length"):
        size({"x": DATA, "label": torch.zeros(3)})
    with pytest.raises(TypeError, match="unpack=lambda batch"):
        make(data=pairs).fit(1)


# What happens on the way.


def test_it_is_the_loop_in_its_docstring() -> None:
    trainer = make(0, ema=0.9, update=Update(clip=0.5), optimiser=None)
    trainer.fit(6)
    twin = make(0, ema=0.9)
    loss, ema, optimiser = twin.loss, twin.ema, torch.optim.Adam(twin.loss.parameters(), 2e-4)
    generator = torch.Generator()
    for step in range(6):
        x = DATA[twin.order.rows(step)]
        optimiser.zero_grad()
        generator.manual_seed(stream(0, "noise", step))
        loss(x, Draws(generator)).backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
        optimiser.step()
        ema.update()  # type: ignore[union-attr]
    assert same(loss.state_dict(), trainer.loss.state_dict())
    assert same(ema.state_dict(), trainer.ema.state_dict())  # type: ignore[union-attr]


def test_it_learns() -> None:
    """ε of Gaussian data is a linear map of x_t at every t; a small network must come near the lowest loss."""
    data = 0.5 * ss.Noise(3).normal((4000, 2), 0)
    truth = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=0.5)
    trainer = make(0, data=data, batch=256, net={"width": 64}, ema=0.98, log_every=100)
    trainer.rates = [5e-3]
    trainer.fit(300)
    lowest = ss.DSM(truth, "simple").eval()(data.double(), 0)
    with trainer.ema.swapped():  # type: ignore[union-attr]
        got = trainer.loss.eval()(data, 0)
    assert float(lowest) < got.item() < 1.1 * float(lowest)


def test_rates_rise_and_follow_the_schedule() -> None:
    trainer = make(update=Update(warmup=4, schedule=lambda step: 0.5 if step >= 6 else 1.0))
    trainer.fit(8)
    rates = [row["rate"] / 2e-4 for row in trainer.history]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_raises_with_the_weights_as_they_were(bad: float) -> None:
    data = DATA.clone()
    data[17] = bad
    trainer = make(data=data, batch=10, ema=0.9)
    with pytest.raises(FloatingPointError, match=r"at step \d.*not finite near λ = .*Update\(nonfinite='skip'\)"):
        trainer.fit(10)
    assert all(bool(p.isfinite().all()) for p in trainer.loss.parameters())
    assert trainer.step == int((torch.cat([trainer.order.rows(k) for k in range(10)]) == 17).nonzero()[0]) // 10


def test_what_is_not_finite_is_skipped_and_counted() -> None:
    data = DATA.clone()
    data[17] = math.nan
    trainer = make(data=data, batch=10, ema=0.9, update=Update(nonfinite="skip"))
    trainer.fit(20)
    assert trainer.step == 20 and trainer.skipped == 2 and trainer.ema.updates == 18  # type: ignore[union-attr]
    assert len(trainer.history) == 18, "one row for each step that was made"
    assert all(math.isfinite(row[key]) for row in trainer.history for key in ("loss", "norm"))
    assert all(bool(p.isfinite().all()) for p in trainer.loss.parameters())
    with pytest.raises(FloatingPointError, match="100 steps in a row"):
        make(data=torch.full((4, 2), math.nan), update=Update(nonfinite="skip")).fit(200)


def test_previews_see_the_average_and_leave_no_trace() -> None:
    seen: list[tuple[int, bool, bool]] = []

    def preview(model: nn.Module, step: int) -> None:
        average = trainer.ema.weights["net.layers.0.weight"]  # type: ignore[union-attr]
        equal = torch.equal(model.net.layers[0].weight, average)  # type: ignore[union-attr]
        seen.append((step, equal, model.training or torch.is_grad_enabled()))
        ss.sample(model, (2, 2), steps=2, seed=0)  # type: ignore[arg-type]
        if step == 6:
            raise KeyboardInterrupt

    plain = make(0, net={"dropout": 0.2}, ema=0.5)
    plain.fit(6)
    trainer = make(0, net={"dropout": 0.2}, hooks=[Preview(preview, every=3)], ema=0.5)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(9)
    assert seen == [(3, True, False), (6, True, False)]
    assert trainer.model.training and same(trainer.loss.state_dict(), plain.loss.state_dict())


def test_a_progress_bar_shows_loss_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    make(hooks=[ProgressBar(True)]).fit(3)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss=" in shown and "samples_per_s=" in shown
    make(hooks=[ProgressBar(False)]).fit(3)
    assert capsys.readouterr().err == ""


def test_tensorboard_is_a_hook(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make(hooks=[TensorBoard(tmp_path)], log_every=2).fit(4)
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert {"train/loss", "train/norm", "train/rate", "train/speed"} <= set(read.Tags()["scalars"])
    assert [event.step for event in read.Scalars("train/loss")] == [2, 4]
    assert any(name.startswith("error/lam") for name in read.Tags()["scalars"])


def test_mixed_precision_is_the_networks_alone() -> None:
    trainer = make(0, precision="bf16")
    trainer.fit(4)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    full = make(0)
    full.fit(4)
    assert losses(trainer) == pytest.approx(losses(full), rel=0.02) and losses(trainer) != losses(full)
    assert {p.dtype for p in trainer.loss.parameters()} == {torch.float32}


# Checkpoints.


def test_checkpoints_are_written_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    trainer = make(hooks=[Checkpoints(tmp_path, every=3, keep=2)])
    assert not trainer.resume()
    trainer.fit(10)
    assert Checkpoints(tmp_path).steps() == [9, 10]
    weights = checkpoint.load(tmp_path / "step-000000010.safetensors")
    net = Net()
    net.load_state_dict({k.removeprefix("model.net."): w for k, w in weights["loss"].items()})
    assert torch.equal(net.layers[0].weight, trainer.loss.model.net.layers[0].weight)


def test_a_torn_checkpoint_is_passed_over_when_resuming(tmp_path: Path) -> None:
    make(hooks=[Checkpoints(tmp_path, every=2)]).fit(4)
    newest = tmp_path / "step-000000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    trainer = make(5, folder=tmp_path)
    with pytest.warns(UserWarning, match="skipped a checkpoint"):
        assert trainer.resume()
    assert trainer.step == 2


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    make(folder=tmp_path).fit(2)
    for option, match in (
        ({"seed": 1}, "seed 0 \\(here 1\\)"),
        ({"batch": 8}, "batch 16 \\(here 8\\)"),
        ({"ema": None}, "average EMA \\(here NoneType\\)"),
        ({"data": DATA[:50]}, "samples 100 \\(here 50\\)"),
    ):
        with pytest.raises(ValueError, match=match):
            make(folder=tmp_path, **option).resume()
    with pytest.raises(ValueError, match=r"network .*out_features=32.*here .*out_features=8"):
        make(folder=tmp_path, net={"width": 8}).resume()


def test_errors_name_the_argument_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, match, bad in (
        (ValueError, "`batch`=15 must be a multiple", lambda: make(batch=15, update=Update(accumulate=2))),
        (ValueError, "`nonfinite` must be one of", lambda: Update(nonfinite="ignore")),
        (ValueError, "`precision` must be one of", lambda: make(precision="half")),
        (ValueError, "`every` must be at least 1", lambda: Checkpoints(Path(), every=0)),
        (ValueError, "`every` must be at least 1", lambda: Preview(print, every=0)),
        (TypeError, r"write hooks=\[Preview\(print, every=1000\)\]", lambda: make(hooks=Preview(print))),
        (TypeError, "`hooks` must be hooks such as Preview.*, got print", lambda: make(hooks=[print])),
        (ValueError, "Checkpoints more than once", lambda: make(folder="run", hooks=[Checkpoints(Path("run"))])),
        (TypeError, r"`update` must be an Update.*got \{", lambda: make(update={"clip": 2.0})),
        (TypeError, "unexpected keyword argument 'preview'", lambda: make(preview=print)),
    ):
        with pytest.raises(error, match=match):
            bad()
    from accelerate import Accelerator

    with pytest.raises(ValueError, match=r"Update\(accumulate=4\) instead"):
        make(accelerator=Accelerator(gradient_accumulation_steps=4))
    with pytest.raises(ValueError, match="`accelerator` sets the precision"):
        make(accelerator=Accelerator(), precision="bf16")
    make()  # after which accelerate's state is that of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched and accelerate sees 1"):
        make()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"must be an nn\.Module, not a function"):
        Trainer(ss.DSM(ss.Denoiser(lambda x, t: x, ss.VP(), predicts="eps")), DATA)
    with pytest.raises(ValueError, match="`folder` is None"):
        make().resume()
    with pytest.raises(ValueError, match="`folder` is None"):
        make().save()


# Hooks.


class Diary(Hook):
    """A list of everything that happens."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def on_start(self, trainer: Trainer, steps: int) -> None:
        self.entries.append(("start", trainer.step, steps))

    def on_step(self, trainer: Trainer, record: Record) -> None:
        assert trainer.step == record.step and record.norm > 0
        self.entries.append(("step", record.step, record.steps, float(record.loss)))

    def on_log(self, trainer: Trainer, row: dict[str, float], levels: Any) -> None:
        assert row is trainer.history[-1]
        assert sum(level["count"] for level in levels) == 16 * (2 if trainer.log_every == 2 and row["step"] == 2 else 1)
        self.entries.append(("log", row["step"], row["loss"]))

    def on_save(self, trainer: Trainer, path: Path) -> None:
        assert path.is_file()
        self.entries.append(("save", path.name))

    def close(self) -> None:
        self.entries.append("close")


def test_hooks_are_called_in_their_order_and_checkpoints_last(tmp_path: Path) -> None:
    diary = Diary()
    drawn: list[bool] = []

    def preview(model: nn.Module, step: int) -> None:
        drawn.append(torch.rand(1).item() >= 0)  # changes a generator that the checkpoint must contain
        diary.entries.append(("preview", step))

    hooks = [Checkpoints(tmp_path, every=2), diary, Preview(preview, every=2)]
    trainer = make(log_every=2, hooks=hooks)
    history = trainer.fit(3)
    losses = [entry[3] for entry in diary.entries if entry[0] == "step"]
    assert diary.entries == [
        ("start", 0, 3),
        ("step", 1, 3, losses[0]),
        ("log", 2, history[0]["loss"]),
        ("step", 2, 3, losses[1]),
        ("preview", 2),
        ("save", "step-000000002.safetensors"),
        ("log", 3, history[1]["loss"]),
        ("step", 3, 3, losses[2]),
        ("save", "step-000000003.safetensors"),
        "close",
    ]
    assert history[0]["loss"] == pytest.approx((losses[0] + losses[1]) / 2) and history[1]["loss"] == losses[2]
    assert [type(hook) for hook in trainer.hooks] == [ProgressBar, Diary, Preview, Checkpoints]
    again = make(1, log_every=2, hooks=hooks)
    assert again.resume() and same(again.state_dict()["rng"][0], trainer.state_dict()["rng"][0])
    again.fit(3)
    assert diary.entries[10:] == [("start", 3, 3), "close"], "there was nothing to train and nothing to save"


def test_hooks_are_closed_after_an_error(tmp_path: Path) -> None:
    class Stop(Hook):
        def on_step(self, trainer: Trainer, record: Record) -> None:
            if record.step == 2:
                raise KeyboardInterrupt

    diary, board = Diary(), TensorBoard(tmp_path)
    trainer = make(hooks=[board, diary, Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(5)
    assert diary.entries[-1] == "close" and "writer" not in repr(board) and trainer.step == 2
    assert [row["step"] for row in trainer.fit(4)] == [1, 2, 3, 4], "the same trainer goes on"


def test_the_averaged_model_is_lent_and_returned() -> None:
    trainer = make(0, net={"dropout": 0.2}, ema=0.5)
    trainer.fit(2)
    trainer.loss.model.net.layers[3].eval()
    before = {name: w.clone() for name, w in trainer.loss.state_dict().items()}
    with trainer.averaged() as model:
        assert torch.equal(model.net.layers[0].weight, trainer.ema.weights["net.layers.0.weight"])
        assert not any(module.training for module in model.modules())
    assert same(dict(trainer.loss.state_dict()), before)
    assert trainer.model.training and not trainer.loss.model.net.layers[3].training


def test_a_trainer_and_its_parts_have_short_texts(tmp_path: Path) -> None:
    def schedule(step: int) -> float:
        return 1.0

    hooks = [Preview(lambda model, step: None), TensorBoard("logs"), Checkpoints(tmp_path), ProgressBar(False)]
    trainer = make(data=Loader(DATA, workers=0), loss=rich, hooks=hooks, update=Update(schedule=schedule))
    for text, lines, words in (
        (repr(trainer), 2, ("DSM(Denoiser(", "100 samples", "step=0", "batch=16", "EMA(", "every=1000", "VP(")),
        (repr(trainer.loss), 1, ("DSM(Denoiser(", "Uncertainty(", "Stratified(", "LossAware(", "drop=0.3", "eps")),
        (repr(trainer.ema), 1, ("EMA(Denoiser with 194 weights", "decay=0.9999", "updates=0")),
        (repr(PowerEMA(trainer.model)), 1, ("PowerEMA(Denoiser", "stds=(0.05, 0.1)")),
        (repr(trainer.update), 1, ("schedule=schedule", "warmup=0", "clip=1.0")),
        (repr(trainer.loader), 1, ("Tensor with 100 samples",)),
        (repr(hooks), 1, ("Preview(<lambda>, every=1000)", "TensorBoard(folder='logs')", "ProgressBar(show=False)")),
    ):
        assert text.count("\n") == lines - 1 and " at 0x" not in text, text
        assert all(word in text for word in words), text


def test_conditions_may_have_one_row_or_none() -> None:
    rows: list[tuple[int, ...]] = []

    class Table(Net):
        def forward(self, x: Tensor, t: Tensor, label: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
            rows.append((len(label), len(table)))
            return super().forward(x, t) + table[label]

    torch.manual_seed(0)
    model = ss.Denoiser(Table(), ss.VP(), predicts="eps")
    cond = {"label": torch.tensor([2]), "table": ss.denoisers.base.Shared(torch.ones(5, 2))}
    loader = Loader(DATA, unpack=lambda x: (x, cond))
    trainer = Trainer(ss.DSM(model, drop=0.5, null={"label": 0}), loader, batch=16)
    trainer.fit(2)
    assert rows == [(16, 5), (16, 5)]
