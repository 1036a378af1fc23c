"""`pgolf data`: make data, and audit it."""

import argparse
from functools import partial
from pathlib import Path

from pgolf.cli.arguments import add_command, count, existing_file
from pgolf_core.config import ROOT, did_you_mean

TOKENIZER_DOCUMENTS = 500_000  # a tokenizer is trained on, unless --documents takes fewer of one's own


def add_commands(commands) -> None:
    text = "make data, and audit it"
    data = add_command(commands, lambda _: data.print_help() or 0, "data", text, "pgolf data docs own.jsonl")
    source = partial(add_command, data.add_subparsers(metavar="SOURCE"))

    text = "docstrings of the installed packages: 17 MB of English, no download"
    sub = source(embedded, "embedded", text, "pgolf data embedded", "pgolf data embedded --large --vocab-size 4096")
    _add_tokenizer(sub)
    sub.add_argument("--large", action="store_true", help="35 MB: more packages, short docstrings, comments")

    example = "pgolf data fineweb --variant sp1024 --train-shards 10"
    sub = source(fineweb, "fineweb", "the challenge's published shards", example)
    sub.add_argument("--variant", default="sp1024", metavar="NAME", help="tokenizer: sp1024 (default), byte260 …")
    sub.add_argument("--train-shards", type=count, default=1, metavar="N", help="shards of 100,000,000 tokens, 200 MB")
    _add_hub(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder of shards; default: data/fineweb10B_<variant>")

    sub = source(
        docs, "docs", "shards of documents: your own, or those the challenge published",
        "pgolf data docs own.jsonl --vocab-size 4096",
        "pgolf data docs notes/ --kinds .tex .org --val-share 0.1",
        "pgolf data docs --documents 120000 --val-documents 50000",
    )  # fmt: skip
    text = "a .jsonl, .txt, .md, .rst, .py, .html, .parquet file, or a folder of them"
    sub.add_argument("source", nargs="?", type=Path, metavar="PATH", help=text)
    text = "take the first N, for the tokenizer of your own documents too; default: all"
    sub.add_argument("--documents", type=count, default=0, metavar="N", help=text)
    text = "read files of these endings too, as plain text"
    sub.add_argument("--kinds", nargs="+", default=[], metavar=".EXT", help=text)
    sub.add_argument("--val-documents", type=count, default=0, metavar="N", help="validate on the first N")
    sub.add_argument("--val-share", type=float, default=0.0, metavar="S", help="validate on a share, chosen by hash")
    sub.add_argument("--field", default="text", metavar="NAME", help="field of a .jsonl or .parquet row with the text")
    sub.add_argument("--split", default="auto", metavar="HOW", help="a .txt document is a file, blank (lines) or line")
    sub.add_argument("--keep-overlap", action="store_true", help="keep training documents that are validation ones too")
    _add_tokenizer(sub)
    sub.add_argument("--tokenizer-path", type=existing_file, metavar="FILE", help="an existing tokenizer, instead")
    text = "train the tokenizer on the first K; default: 500,000, or --documents of your own"
    sub.add_argument("--tokenizer-documents", type=count, metavar="K", help=text)
    sub.add_argument("--workers", type=count, default=0, metavar="W", help="threads; default: one per core")
    _add_hub(sub)
    sub.add_argument("--download", type=Path, metavar="DIR", help="folder of published documents; default: data/docs")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder of shards; default: data/<name>_<tokenizer>")

    text = "audit a folder of shards; exit status 1 if scores on it would be false"
    sub = source(audit, "audit", text, "pgolf data audit data/own_sp4096", "pgolf data audit data/own_sp4096 --fast")
    sub.add_argument("folder", type=Path, metavar="DIR", help="folder of shards")
    sub.add_argument("--fast", action="store_true", help="read a sample of the documents, as every run does")
    sub.add_argument("--seq-len", type=count, default=1024, metavar="N", help="window in tokens; default 1024")
    sub.add_argument("--max-tokens", type=count, default=0, metavar="N", help="tokens that are scored; default: all")
    sub.add_argument("--max-documents", type=count, default=0, metavar="N", help="documents scored; default: all")
    sub.add_argument("--source", type=Path, metavar="PATH", help="source documents, whose bytes must be counted")


def _add_tokenizer(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--tokenizer", default="bpe", metavar="KIND", help="bpe (default), unigram or bytes")
    sub.add_argument("--vocab-size", type=count, metavar="V", help="tokens of the tokenizer; default 1024, bytes 260")
    text = "caseops: capitals as operators, exactly invertible, scored over the original bytes"
    sub.add_argument("--transform", default="", metavar="HOW", help=text)


def _add_hub(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--revision", default="main", metavar="R", help="branch, tag or commit of the publication")
    sub.add_argument("--endpoint", metavar="URL", help="address of a mirror of the hub")


def embedded(arguments: argparse.Namespace) -> int:
    from pgolf.data.embedded_corpus import build_embedded

    options = dict(kind=arguments.tokenizer, large=arguments.large, transform=arguments.transform)
    print(build_embedded(_vocab_size(arguments), **options))
    return 0


def _vocab_size(arguments: argparse.Namespace) -> int:
    return arguments.vocab_size or (260 if arguments.tokenizer == "bytes" else 1024)


def fineweb(arguments: argparse.Namespace) -> int:
    from pgolf.data import hub

    out = arguments.out and arguments.out.absolute()  # relative to the working directory, not to the checkout
    hub.fineweb(arguments.variant, arguments.train_shards, arguments.revision, arguments.endpoint, out)
    return 0


def docs(arguments: argparse.Namespace) -> int:
    from pgolf.data import documents, hub, prepare, train_tokenizer
    from pgolf_core.files import DataError

    published, wanted, val_documents = arguments.source is None, arguments.documents, arguments.val_documents
    kind, vocab_size, tokenizer_path = arguments.tokenizer, _vocab_size(arguments), arguments.tokenizer_path
    if tokenizer_path and arguments.vocab_size:
        raise DataError("--vocab-size: the tokenizer at --tokenizer-path has its own size; name one of them")
    if not val_documents and not arguments.val_share:
        val_documents = 50_000 if published else 0
    of_all = TOKENIZER_DOCUMENTS if published or not wanted else min(wanted, TOKENIZER_DOCUMENTS)
    tokenizer_documents = arguments.tokenizer_documents or of_all
    request = prepare.BuildRequest(
        kind=kind,
        vocab_size=vocab_size,
        tokenizer_path=tokenizer_path,
        documents=wanted,
        val_documents=val_documents,
        val_share=arguments.val_share or (0.0 if val_documents else 0.01),
        tokenizer_documents=tokenizer_documents,
        tokenizer_sees_val=published,  # like the published tokenizers
        keep_overlap=arguments.keep_overlap or published,
        transform=arguments.transform,
    )
    path = arguments.source
    if published:
        trained_on = 0 if tokenizer_path or kind == "bytes" else tokenizer_documents
        folder = arguments.download and arguments.download.absolute()
        path = hub.documents(wanted and max(wanted, trained_on), arguments.revision, arguments.endpoint, folder)
    tokenizer = tokenizer_path.stem if tokenizer_path else train_tokenizer.name_of(kind, vocab_size)
    made = filter(None, [f"{wanted or ''}", arguments.transform, tokenizer])
    name = "_".join(["docs" if published else path.stem, *made])
    out = arguments.out or ROOT / "data" / name
    source = documents.open_source(path.resolve(), arguments.field, arguments.split, arguments.kinds)
    prepare.build(source, out.absolute(), request, arguments.workers)
    return 0


def audit(arguments: argparse.Namespace) -> int:
    """Exit status 1 if a score on this data would be false."""
    from pgolf.data import audit, documents, prepare
    from pgolf.data.dataset import Dataset
    from pgolf_core.files import DataError

    folder = arguments.folder.absolute()
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise DataError(f"{arguments.folder}: no such folder{did_you_mean(folder.name, beside)}")
    limits, texts = dict(max_tokens=arguments.max_tokens, max_documents=arguments.max_documents), None
    if arguments.source:
        made_of = Dataset.open(folder).about.get("source", {})
        if not made_of.keys() >= {"documents_taken"} or not made_of.keys() & {"val_documents", "val_share"}:
            raise DataError(
                f"--source: {arguments.folder} has no dataset.json that says which documents are in it; audit it "
                "without --source, or build it with `pgolf data docs`"
            )
        field, split = made_of.get("field", "text"), made_of.get("split", "auto")
        source = documents.open_source(arguments.source.resolve(), field, split, made_of.get("kinds", ()))
        if any(made_of.get(name) != value for name, value in source.about().items()):
            raise DataError(f"{arguments.source}: not what {arguments.folder} was made of, by its dataset.json")
        texts = prepare.validation_texts(source, made_of)
    thorough = not arguments.fast
    found = audit.audit_folder(folder, seq_len=max(1, arguments.seq_len), thorough=thorough, documents=texts, **limits)
    print(audit.format_audit(found))
    if found.thorough and not any(limits.values()):
        audit.store(Dataset.open(folder), found)  # runs on this data state it, or refuse the data
    return 0 if found.ok else 1
