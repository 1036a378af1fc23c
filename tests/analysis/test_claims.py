"""What submission.json claims, held against all logs of its record: nothing false is said of an honest one."""

import json

import pytest
from support.logs import LEGAL_TTT, REFERENCE, SLIDING

from pgolf.analysis import claims
from pgolf.analysis.training_logs import read

BPB = "1.23456780"


def log(seed: int = 1337, bpb: str = BPB, **other: str):
    """The reference's log with another seed and score."""
    return read(REFERENCE.replace("seed:1337", f"seed:{seed}").replace(BPB, bpb).replace("1.2346", bpb[:6]))


def told(submission: dict | str, *logs) -> tuple[list[str], list[str]]:
    """Flags and disagreements about the first log."""
    text = submission if isinstance(submission, str) else json.dumps(submission)
    return claims.compare(logs[0], claims.parsed(text.encode()) or {}, list(logs))


def of_record(submission: dict, tmp_path, *logs) -> list[str]:
    (tmp_path / "submission.json").write_text(json.dumps(submission))
    return claims.of_record(tmp_path, list(logs))


def test_a_claim_about_a_seed_agrees_with_any_of_its_logs():
    """A first version, a rerun, and a log of the last evaluation alone have the seed of the log that is meant."""
    submission = {"seeds": {"1337": {"val_bpb": 1.21, "artifact_bytes": 15750000}, "42": {"val_bpb": 1.11211122}}}
    assert told(submission, log(), log(bpb="1.21000000")) == ([], [])
    assert told(submission, read(SLIDING), read("seed:42\n" + LEGAL_TTT)) == ([], [])
    assert told(submission, log(), log(bpb="1.30000000"))[1] == [
        "seed_results 1337 val_bpb 1.21 in submission.json, 1.2345678 in the log"
    ]


@pytest.mark.parametrize(
    "seeds",
    [
        {"seed_results": {"1337": {"val_bpb": 1.21}, "mean": {"val_bpb": 1.0}, "std": 0.1}},
        {"seed_results": [{"seed": 1337, "val_bpb": 1.21}, {"seed": [[1]]}, 7.5]},
        {"seeds": {"seed_1337": 1.21}},
        {"results": {"seeds": {"1337": {"val_bpb": 1.21}}}},
        {"val_bpb_seeds": {"1337": 1.21}},
    ],
)
def test_seeds_as_records_write_them(seeds, tmp_path):
    assert told(seeds, log())[1] == ["seed_results 1337 val_bpb 1.21 in submission.json, 1.2345678 in the log"]
    assert told(seeds, log(bpb="1.21000000")) == ([], [])
    assert of_record(seeds, tmp_path, log()) == []


def test_means_and_deviations_of_seeds(tmp_path):
    logs = [log(1, "1.10000000"), log(2, "1.20000000"), log(3, "1.30000000")]
    right = {"seeds": [1, 2, 3], "val_bpb": 1.2, "mean_val_bpb": 1.2001, "val_bpb_std": 0.1, "std_val_bpb": 0.0804}
    assert of_record(right, tmp_path, *logs) == []
    assert of_record(right | {"val_bpb": 1.3}, tmp_path, *logs) == []  # the score of one seed
    found = of_record(right | {"val_bpb": 1.25, "mean_val_bpb": 1.15, "val_bpb_std": 0.2}, tmp_path, *logs)
    assert [text.partition(": ")[2] for text in found] == [
        "val_bpb 1.25 in submission.json, 1.20000000 is the mean of its 3 seeds' logs",
        "mean_val_bpb 1.15 in submission.json, 1.20000000 is the mean of its 3 seeds' logs",
        "val_bpb_std 0.2 in submission.json, 0.10000000 is the standard deviation of its 3 seeds' logs",
    ]
    twice = [*logs, log(2, "1.90000000")]  # which of seed 2?
    assert of_record({"seeds": [1, 2, 3], "val_bpb": 1.9}, tmp_path, *twice) == []
    known = {"seeds": {"1": 1.1, "2": 1.2, "3": 1.3}, "mean_val_bpb": 1.25}
    assert len(of_record(known, tmp_path, *twice)) == 1
    sliding = [read(SLIDING.replace("seed:42", f"seed:{seed}") + LEGAL_TTT) for seed in (1, 2)]
    assert of_record({"seeds": [1, 2], "val_bpb": 1.14441111}, tmp_path, *sliding) == []  # of an earlier evaluation


def test_other_figures():
    assert told({"val_bpb": 1.12111111}, read(SLIDING + LEGAL_TTT)) == (
        [
            "val_bpb 1.12111111 in submission.json is that of final_int8_zlib_roundtrip_exact, "
            "and legal_ttt_exact is the last"
        ],
        [],
    )  # fmt: skip
    assert told({"model_params": 1234567, "bytes_total": 15750000}, log()) == ([], [])
    assert told({"model_params": 1235000, "params": 1.2}, log()) == ([], [])
    assert told({"model_params": 1334567}, log())[1] == ["model_params 1334567 in submission.json, 1234567 in the log"]
    assert told({"bytes_total": 15751000}, log())[1] == ["bytes_total 15751000 in submission.json, 15750000 in the log"]
    assert told({"bytes_code": 50000, "seeds": [7]}, log())[1] == ["seed 1337 is not among those of submission.json: 7"]
    assert told({"val_loss": 0.0, "val_bpb": None, "steps": True, "bytes_total": "15 MB"}, log()) == ([], [])


DEEP = '{"seeds": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "text",
    [
        DEEP, "[" * 900 + "]" * 900, '{"val_bpb": 1e999999999}', '{"val_bpb": -1e-999999999999999999999}', "\0", "",
        '{"val_bpb": NaN, "bytes_total": Infinity}', '{"bytes_total": ' + "9" * 4000 + "}", '{"seeds": ["7", "7"]}',
        '{"seeds": {"' + "9" * 4000 + '": {"val_bpb": 1.0}}}', '{"seeds": [[1], {"seed": {}}, null, 1e400]}',
        '{"seed_results": {"1337": [1]}, "results": [1], "seeds": 3, "params": -0.0}', '{"val_bpb": 0e99999999999}',
        '{"val_bpb": 1.' + "1" * 5000 + ', "mean_val_bpb": 1.' + "1" * 5000 + "}", '{"steps": 1' + "0" * 5000 + "}",
    ],
)  # fmt: skip
def test_an_absurd_submission_is_no_error(text, tmp_path):
    flags, found = told(text, log())
    assert all(len(said) < 500 for said in flags + found)
    (tmp_path / "submission.json").write_text(text)
    assert all(len(said) < 500 for said in claims.of_record(tmp_path, [log(), log(2)]))
    (tmp_path / "submission.json").write_bytes(b"[" * 2**21)
    assert claims.parsed(claims.read_claims(tmp_path)) is None
