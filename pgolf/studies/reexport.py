"""Runs derived from a finished run's checkpoint: its re-export under other knobs, and the frame of every study."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from pgolf.runs.code import other_code
from pgolf.runs.directory import describe_environment, locked
from pgolf.runs.result import (
    ARTIFACT,
    CHECKPOINT,
    Result,
    evaluation_protocol,
    finished_run,
    stored_result,
    write_result,
)
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import Scored, load_checkpoint, round_trip, roundtrip_fields, score_model
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.device import cpu_threads, pick_device
from pgolf_core.export_inputs import model_of
from pgolf_core.knobs import EvalConfig, ExportConfig
from pgolf_core.quantization.calibration import Calibration

# Knobs that may differ from the source's; all others describe the training it had.
SCORING_KNOBS = {
    *ExportConfig.model_fields,
    *EvalConfig.model_fields,
    *("data_path", "tokenizer_path", "device", "precision", "cpu_threads"),
    *("halting_eval", "halting_threshold", "halting_passes"),
}


def scoring_config(config: RunConfig, knobs: dict) -> RunConfig:
    """A finished run's config with other knobs. ConfigError naming those that would need another training."""
    changed = config.with_knobs(**knobs)
    if trained := sorted(config.differences(changed).keys() - SCORING_KNOBS):
        raise ConfigError(
            f"{', '.join(f'{k}={getattr(changed, k)!r}' for k in trained)}: the run was trained with "
            f"{', '.join(f'{k}={getattr(config, k)!r}' for k in trained)}; train another run for that"
        )
    return changed


def export_checkpoint(
    source_dir: str | Path, run_dir: str | Path, calibration: Calibration | None = None, scored: Scored | None = None,
    **knobs,
) -> Result:  # fmt: skip
    """A run that exports and scores another run's checkpoint with other export or eval knobs.

    calibration, scored: of that checkpoint with the same knobs, if they were made before, as in `round_trip`. Returns
    the stored result if the directory is complete. Raises RunError or ConfigError.
    """

    def export(source: Result, trained: RunConfig, config: RunConfig) -> Result:
        dataset, device = open_dataset(config), pick_device(config.train)
        state = load_checkpoint(Path(source_dir) / CHECKPOINT)
        trip = round_trip(state, config, dataset, Path(run_dir) / ARTIFACT, calibration, scored=scored)
        raw_bpb, raw_nats = source.prequant_val_bpb, source.prequant_block_nats
        was = evaluation_protocol(trained.eval, trained.train, source.environment["device"])
        same = was == evaluation_protocol(config.eval, config.train, device.type)
        same = same and (trained.eval, trained.model) == (config.eval, config.model)
        same = same and source.data_fingerprint == dataset.fingerprint
        if not (raw_nats and same and source.roundtrip_tokens == trip.score.tokens):
            raw = score_model(model_of(state, config, device), config, dataset, roundtrip=True)
            raw_bpb, raw_nats = raw.val_bpb, raw.block_nats
        fields = roundtrip_fields(trip, raw_bpb, raw_nats, dataset, config)
        return replace(source, kind="export", **fields)

    return derive(source_dir, run_dir, knobs, export)


def study(kind: str, source: Result, config: RunConfig, rows: list[dict], data_fingerprint: str) -> Result:
    """What a study of source's checkpoint found: a table, and no score of its own that a frontier would take."""
    protocol = evaluation_protocol(config.eval, config.train, pick_device(config.train).type)
    facts = dict(checkpoint_sha256=source.checkpoint_sha256, protocol=protocol)
    return Result(kind, config.hash, source.seed, source.track, data_fingerprint=data_fingerprint, table=rows, **facts)


def derive(
    source_dir: str | Path,
    run_dir: str | Path,
    knobs: dict,
    make: Callable[[Result, RunConfig, RunConfig], Result],
    answers: Callable[[Result], bool] = lambda stored: True,
) -> Result:
    """The stored result if it answers, else that of make(source's result, its config, this run's config), written.

    answers(stored result): whether it is what is asked for. Raises RunError if the source is incomplete, ConfigError
    on knobs of training.
    """
    source_dir, run_dir = Path(source_dir), Path(run_dir)
    source, trained = finished_run(source_dir)
    config = scoring_config(trained, knobs)
    with locked(run_dir, config), cpu_threads(config.cpu_threads):
        stored = stored_result(run_dir, source_dir, source)
        if stored is not None and answers(stored):
            if made := other_code(stored):
                tqdm.write(f"{run_dir.name}: complete, {made}; to make it anew, name another run or delete {run_dir}")
            return stored
        environment = describe_environment(pick_device(config.train), studies=True)
        made = make(source, trained, config)
        name = f"{source_dir.parent.name}/{source_dir.name}"
        return write_result(run_dir, replace(made, source=name, config_hash=config.hash, environment=environment))
