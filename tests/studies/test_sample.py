"""Text from a file: the same for one seed, from the file that is on disk, and refused where there is none."""

import shutil

import pytest

from pgolf.cli import main
from pgolf.runs.result import ARTIFACT, RunError
from pgolf.studies.sample import sample, store_sample


def test_a_sample_goes_on_with_its_prompt_and_is_the_seeds(finished):
    prompts = ["", "The name of"]
    rows = sample(finished[0], prompts, tokens=20, seed=3)
    assert [row["prompt"] for row in rows] == prompts and rows[1]["text"].startswith("The name of")
    assert rows == sample(finished[0], prompts, tokens=20, seed=3) != sample(finished[0], prompts, tokens=20, seed=4)
    spaced = [row["text"] for row in sample(finished[0], ["The "] * 4, tokens=1, temperature=9)]
    assert all(text.startswith("The ") for text in spaced)
    greedy = [sample(finished[0], ["a"], tokens=8, temperature=0, seed=seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_the_sample_is_of_the_file_on_disk(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    (run_dir / "checkpoint.safetensors").unlink()
    assert main.main(["generate", str(run_dir), "one", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("one")
    (run_dir / ARTIFACT).unlink()
    with pytest.raises(RunError, match=r"has no artifact\.pgolf"):
        sample(run_dir)


def test_a_stored_sample_is_returned_for_its_prompts_alone(finished, tmp_path):
    result = store_sample(finished[0], tmp_path / "s", ["a"], 4, 0.7)
    assert result.kind == "sample" and result.source.endswith(finished[0].name)
    assert store_sample(finished[0], tmp_path / "s", ["a"], 4, 0.7) == result
    with pytest.raises(RunError, match="of other prompts"):
        store_sample(finished[0], tmp_path / "s", ["b"], 4, 0.7)
