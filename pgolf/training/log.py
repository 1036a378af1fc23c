"""What a training prints and keeps: lines in log.txt and on the screen, rows in metrics.jsonl and in loggers."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from pgolf.processes import interactive
from pgolf.runs.directory import metric_rows
from pgolf.training.loggers import Loggers
from pgolf.training.round_trip import RoundTrip
from pgolf_core.config import RunConfig
from pgolf_core.evaluate import Score
from pgolf_core.files import atomic_write


class Log:
    """Appends lines to log.txt and rows to metrics.jsonl; without a run directory (ranks other than 0) it is silent."""

    def __init__(self, run_dir: Path | None, resume_step: int, config: RunConfig):
        self.silent, self.iterations, self.limit_s = run_dir is None, config.iterations, config.max_wallclock_seconds
        self.step = resume_step  # of the last row
        if self.silent:
            return
        self.text, self.rows = run_dir / "log.txt", run_dir / "metrics.jsonl"
        if not resume_step:
            self.text.unlink(missing_ok=True)
        # Drop rows newer than the resume file, whose own step is not validated yet; they will be logged again.
        kept = [row for row in metric_rows(run_dir, most=None) if (row["step"], "val_bpb" in row) < (resume_step, True)]
        atomic_write(self.rows, "".join(json.dumps(row) + "\n" for row in kept))
        self.loggers = Loggers(run_dir, resume_step, config)

    def __call__(self, line: str, shown: str | None = "", **row: float) -> None:
        """Keep a line and a row, and print the line; shown: printed behind it, and not kept; None: nothing printed."""
        if self.silent:
            return
        if shown is not None:
            tqdm.write(line + shown)
        with open(self.text, "a", encoding="utf-8", newline="\n") as f:
            f.write(line + "\n")
        if row:
            with open(self.rows, "a", encoding="utf-8", newline="\n") as f:
                f.write(json.dumps(row) + "\n")
            self.step = row["step"]
            self.loggers.log(row)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        if not self.silent:
            self.loggers.close(failed=error is not None)

    def progress_bar(self, step: int) -> tqdm:
        """In a notebook it goes to stdout like the lines, so that neither breaks up the other."""
        stream = sys.stdout if "ipykernel" in sys.modules else sys.stderr
        hidden = self.silent or not interactive()
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"  # the time left is in the postfix
        return tqdm(total=self.iterations, initial=step, unit="step", file=stream, disable=hidden, bar_format=form)

    def time_left(self, step: int, seconds: float) -> str:
        """'1:05' (minutes) of training after `step` steps in so many seconds, by steps or by the time limit."""
        left = seconds / step * (self.iterations - step)
        return tqdm.format_interval(min(left, max(0.0, self.limit_s - seconds)) if self.limit_s else left)

    def validation(self, step: int, score: Score, seconds: float) -> None:
        self(
            f"step:{step}/{self.iterations} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
            f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms",
            step=step, val_loss=score.val_loss, val_bpb=score.val_bpb, train_seconds=seconds,
        )  # fmt: skip

    def training(self, step: int, nats: float, penalty: float, lr_scale: float, seconds: float, tokens: int) -> None:
        """tokens: of all steps."""
        self(
            f"step:{step}/{self.iterations} train_loss:{nats:.4f} train_time:{1000 * seconds:.0f}ms "
            f"step_avg:{1000 * seconds / step:.2f}ms comp_reg:{penalty:.6f}",
            shown=f" left:{self.time_left(step, seconds)}",
            step=step, train_loss=nats, comp_reg=penalty, lr_factor=lr_scale, train_seconds=seconds,
            tokens_per_second=tokens / seconds,
        )  # fmt: skip

    def round_trip(self, trip: RoundTrip, scheme: str, prequant: Score) -> None:
        account, score = trip.account, trip.score
        self(f"pre-quantization val_loss:{prequant.val_loss:.8f} val_bpb:{prequant.val_bpb:.8f}")
        codec = scheme.replace("_", "+")
        self(f"Serialized model {codec}: {account.artifact} bytes (payload:{account.payload})")
        self(f"Total submission size {codec}: {account.total} bytes (code:{account.code} cap:{account.cap})")
        if not account.fits:
            self(f"over the cap by {account.total - account.cap} bytes")
        if trip.unadapted:
            self(f"not adapted: val_bpb:{trip.unadapted.val_bpb:.8f}")
        for name, figures in trip.details.items():
            self(f"{name}:{figures}")
        of_score = f"val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}"
        self(f"final_{scheme}_roundtrip {of_score} eval_time:{1000 * trip.eval_seconds:.0f}ms")
        self(f"final_{scheme}_roundtrip_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
        if not self.silent:
            sizes = dict(artifact_bytes=account.artifact, total_bytes=account.total, cap_bytes=account.cap)
            self.loggers.log(dict(step=self.step, roundtrip_val_bpb=score.val_bpb, **sizes))

    def budget(self, budget: dict, overtime: float) -> None:
        if budget["limit"]:
            counted = f"{budget['train']:.1f}s training + {budget['calibration']:.1f}s calibration"
            self(f"wallclock:{counted} of {budget['limit']:g}s")
        if overtime:
            self(f"over the wallclock limit by {overtime:.1f} s")
