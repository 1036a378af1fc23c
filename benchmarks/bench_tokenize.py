"""Tokenise a file of documents: throughput relative to bare SentencePiece, and peak memory of all processes.

    python benchmarks/bench_tokenize.py [--megabytes 200] [--workers 2] [--rounds 3] [--tokenizer FILE] [--train]

The bars are 0.8 of SentencePiece with as many threads (encode() of lists of 1024 texts in memory, tokens discarded) and
1 GB. The two take turns in processes of their own. pgolf is timed from the .jsonl to the finished folder; both times
exclude the start of Python and imports. --train also trains tokenizers on the same text.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

BARE = """
import json, sys, time
import sentencepiece
path, tokenizer, workers, _ = sys.argv[1:]
sp = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
with open(path, encoding="utf-8") as f:
    texts = [json.loads(line)["text"] for line in f]
start = time.perf_counter()
for i in range(0, len(texts), 1024):
    sp.encode(texts[i : i + 1024], num_threads=int(workers))
print(time.perf_counter() - start)
"""
OURS = """
import sys, time
from pgolf.data import documents, prepare
path, tokenizer, workers, out = sys.argv[1:]
start = time.perf_counter()
request = prepare.BuildRequest(tokenizer_path=tokenizer, val_documents=200, keep_overlap=True)
prepare.build(documents.open_source(path), out, request, workers=int(workers))
print(time.perf_counter() - start)
"""
TRAIN = """
import sys, time
from pgolf.data import documents, train_tokenizer
path, kind, vocab_size = sys.argv[1:]
start = time.perf_counter()
train_tokenizer.train(documents.first_texts(documents.open_source(path)), kind, int(vocab_size))
print(time.perf_counter() - start)
"""


def write_documents(path: Path, size: int) -> int:
    """Write a .jsonl of the embedded corpus's documents, repeated with numbers; returns the bytes of their text."""
    from pgolf.data import embedded_corpus

    texts, written, copy = [document.text for document in embedded_corpus.embedded_documents()], 0, 0
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        while written < size:
            for text in texts:
                text = f"{copy}. {text}"
                f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                if written >= size:
                    break
            copy += 1
    return written


def measure(program: str, *arguments: object) -> tuple[float, int]:
    """Seconds that the program prints last, and the peak resident bytes of it and its children."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, encoding="utf-8"
    )
    parent, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            family = [parent, *parent.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"failed with {process.returncode}")
    return float(process.stdout.read().splitlines()[-1]), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=Path("data/embedded_sp1024/tokenizer.model"))
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        size = write_documents(path, options.megabytes * 1_000_000)
        rates, ratios, peaks = {"bare": [], "ours": []}, [], []
        for i in range(options.rounds):
            bare, _ = measure(BARE, path, options.tokenizer, options.workers, "")
            ours, peak = measure(OURS, path, options.tokenizer, options.workers, Path(folder) / str(i))
            for name, seconds in (("bare", bare), ("ours", ours)):
                rates[name].append(size / seconds / 1e6)
            ratios.append(bare / ours)
            peaks.append(peak)
            print(
                f"bare {rates['bare'][-1]:.2f} MB/s, ours {rates['ours'][-1]:.2f} MB/s, {peak / 1e6:.0f} MB", flush=True
            )
        print(f"{size / 1e6:.0f} MB of text, {options.workers} workers, median of {options.rounds} rounds:")
        print(f"throughput {statistics.median(ratios):.2f} of bare SentencePiece (bar: 0.80)")
        print(f"peak memory {max(peaks) / 1e6:.0f} MB of all processes (bar: 1000)")
        for kind, vocab_size in (("bpe", 1024), ("bpe", 8192)) if options.train else ():
            seconds, peak = measure(TRAIN, path, kind, vocab_size)
            print(f"training {kind} {vocab_size}: {seconds:.0f} s, {peak / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
