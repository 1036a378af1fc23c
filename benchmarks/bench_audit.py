"""Time a fast and a thorough audit of a made-up folder of the size of a published one with one train shard.

    python benchmarks/bench_audit.py [--val-tokens 62022133] [--train-tokens 100000000] [--rounds 3]

Its documents are those of the embedded corpus, each with a number in front so that none repeats. Needs 1 GB of disk.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from pgolf.data import audit, embedded_corpus
from pgolf.data.dataset import describe
from pgolf_core.shards import header, read_shard


def fill(path: Path, documents: list[np.ndarray], tokens: int, number: int) -> int:
    """Write a shard of so many tokens; returns the number of the next document."""
    parts, left = [], tokens
    while left > 0:
        digits = [300 + int(digit) for digit in str(number)]
        document = np.concatenate([[1], digits, documents[number % len(documents)][1:]])[:left]
        parts.append(document)
        left -= len(document)
        number += 1
    path.write_bytes(header(tokens) + np.concatenate(parts).astype("<u2").tobytes())
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--val-tokens", type=int, default=62_022_133)
    parser.add_argument("--train-tokens", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    embedded = embedded_corpus.build_embedded(1024)
    tokens = np.array(read_shard(embedded / "fineweb_val_000000.bin"))
    documents = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(embedded / "tokenizer.model", folder)
        number = fill(folder / "fineweb_val_000000.bin", documents, arguments.val_tokens, 0)
        fill(folder / "fineweb_train_000000.bin", documents, arguments.train_tokens, number)
        dataset = describe(folder)
        for thorough in (False, True):
            seconds = []
            for _ in range(arguments.rounds):
                start = time.perf_counter()
                found = audit.audit(dataset, thorough=thorough)
                seconds.append(time.perf_counter() - start)
            split = found.figures["val"]
            print(
                f"{'thorough' if thorough else 'fast':9} {min(seconds):.2f} to {max(seconds):.2f} s: "
                f"{split['documents']:,} documents of {split['tokens']:,} validation tokens, "
                f"{found.figures['train']['tokens_read']:,} training tokens read, {len(found.findings)} findings"
            )


if __name__ == "__main__":
    main()
