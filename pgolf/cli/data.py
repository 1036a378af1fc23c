"""`pgolf data`: make data ready, and hold it to what its scores claim."""

import argparse
from pathlib import Path

from pgolf.cli.arguments import count, existing_file
from pgolf_core.config import ROOT


def add_commands(commands) -> None:
    data = commands.add_parser("data", help="make data ready, and hold it to what its scores claim")
    data.set_defaults(command=lambda _: data.print_help() or 0)
    sources = data.add_subparsers(metavar="SOURCE")

    def source(function, name: str, text: str) -> argparse.ArgumentParser:
        sub = sources.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    def add_tokenizer(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--tokenizer", default="bpe", metavar="KIND", help="bpe (default), unigram or bytes")
        sub.add_argument("--vocab-size", type=count, metavar="V", help="pieces; default 1024, of bytes 260")

    def add_hub(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--revision", default="main", metavar="R", help="branch, tag or commit of the publication")
        sub.add_argument("--endpoint", metavar="URL", help="a mirror of the hub")

    sub = source(embedded, "embedded", "docstrings of the installed packages: 17 MB of English, no download")
    add_tokenizer(sub)
    sub.add_argument("--large", action="store_true", help="35 MB: more packages, short docstrings, comments")

    sub = source(fineweb, "fineweb", "the challenge's published shards")
    sub.add_argument("--variant", default="sp1024", metavar="NAME", help="sp1024 (default), byte260 …: its tokenizer")
    sub.add_argument("--train-shards", type=count, default=1, metavar="N", help="of 100,000,000 tokens, 200 MB, each")
    add_hub(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: data/fineweb10B_<variant>")

    sub = source(docs, "docs", "shards of documents: your own, or those the challenge published")
    sub.add_argument(
        "source", nargs="?", type=Path, metavar="PATH", help="a .jsonl, .txt or .parquet file, or a folder"
    )
    sub.add_argument("--documents", type=count, default=0, metavar="N", help="only the first N; default: all")
    sub.add_argument("--val-documents", type=count, default=0, metavar="N", help="the first N are for validation")
    sub.add_argument("--val-share", type=float, default=0.0, metavar="S", help="a share of them is, by hash: 0.01")
    add_tokenizer(sub)
    sub.add_argument("--tokenizer-path", type=existing_file, metavar="FILE", help="a tokenizer that is there, instead")
    sub.add_argument("--tokenizer-documents", type=count, default=500_000, metavar="K", help="train it on the first K")
    sub.add_argument("--field", default="text", metavar="NAME", help="of a .jsonl or .parquet row")
    sub.add_argument(
        "--split", default="auto", metavar="HOW", help="of .txt: a document is a file, blank (lines), line"
    )
    sub.add_argument("--keep-overlap", action="store_true", help="training documents that are validation ones too stay")
    sub.add_argument("--workers", type=count, default=0, metavar="W", help="threads; default: a core each")
    add_hub(sub)
    sub.add_argument("--download", type=Path, metavar="DIR", help="of published documents; default: data/docs")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: data/<name>_<tokenizer>")

    sub = source(audit, "audit", "hold a folder of shards to what its scores claim; exit 1 where they would be false")
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--fast", action="store_true", help="what every run does: a sample of documents")
    sub.add_argument("--seq-len", type=count, default=1024, metavar="N", help="window in tokens; default 1024")
    sub.add_argument("--max-tokens", type=count, default=0, metavar="N", help="that are scored; default: all")
    sub.add_argument("--max-documents", type=count, default=0, metavar="N", help="that are scored; default: all")
    sub.add_argument(
        "--source", type=Path, metavar="PATH", help="documents it was made of: their bytes must be counted"
    )


def embedded(arguments: argparse.Namespace) -> int:
    from pgolf.data import embedded_corpus

    kind = arguments.tokenizer
    print(embedded_corpus.build_embedded(_vocab_size(arguments), kind=kind, large=arguments.large))
    return 0


def _vocab_size(arguments: argparse.Namespace) -> int:
    return arguments.vocab_size or (260 if arguments.tokenizer == "bytes" else 1024)


def fineweb(arguments: argparse.Namespace) -> int:
    from pgolf.data import hub

    out = arguments.out and arguments.out.absolute()  # of the command line: from here, not from the checkout
    hub.fineweb(arguments.variant, arguments.train_shards, arguments.revision, arguments.endpoint, out)
    return 0


def docs(arguments: argparse.Namespace) -> int:
    from pgolf.data import documents, hub, prepare, train_tokenizer
    from pgolf_core.files import DataError

    published = arguments.source is None
    kind, vocab_size = arguments.tokenizer, _vocab_size(arguments)
    if arguments.tokenizer_path:
        if arguments.vocab_size:
            raise DataError("--vocab-size: the tokenizer at --tokenizer-path has a size of its own; name one of them")
        name = arguments.tokenizer_path.stem
    else:
        train_tokenizer.check(kind, vocab_size)
        name = train_tokenizer.name_of(kind, vocab_size)
    wanted = arguments.documents
    if published:
        trained_on = 0 if arguments.tokenizer_path or kind == "bytes" else arguments.tokenizer_documents
        folder = arguments.download and arguments.download.absolute()
        path = hub.documents(wanted and max(wanted, trained_on), arguments.revision, arguments.endpoint, folder)
        val_documents = arguments.val_documents or (0 if arguments.val_share else 50_000)
    else:
        path, val_documents = arguments.source.resolve(), arguments.val_documents
    val_share = arguments.val_share or (0.0 if val_documents else 0.01)
    stem = "docs" if published else path.stem
    out = arguments.out or ROOT / "data" / f"{stem}{f'_{wanted}' if wanted else ''}_{name}"
    prepare.build(
        documents.open_source(path, arguments.field, arguments.split),
        out.absolute(),
        kind=kind,
        vocab_size=vocab_size,
        tokenizer_path=arguments.tokenizer_path,
        documents=wanted,
        val_documents=val_documents,
        val_share=val_share,
        tokenizer_documents=arguments.tokenizer_documents,
        tokenizer_sees_val=published,  # as the published tokenizers did
        keep_overlap=arguments.keep_overlap or published,
        workers=arguments.workers,
    )
    return 0


def audit(arguments: argparse.Namespace) -> int:
    """Exit status 1 where a score on this data would be false."""
    from pgolf.data import audit, documents, prepare
    from pgolf.data.dataset import Dataset
    from pgolf_core.files import DataError

    folder = arguments.folder.absolute()
    if not folder.is_dir():
        raise DataError(f"{arguments.folder}: no such folder")
    options = dict(seq_len=max(1, arguments.seq_len), thorough=not arguments.fast)
    limits = dict(max_tokens=arguments.max_tokens, max_documents=arguments.max_documents)
    if arguments.source:
        told = Dataset.open(folder).about.get("source", {})
        source = documents.open_source(arguments.source.resolve(), told.get("field", "text"), told.get("split", "auto"))
        if any(told.get(name) != value for name, value in source.about().items()):
            raise DataError(f"{arguments.source}: not what {arguments.folder} was made of, as its dataset.json tells")
        options["documents"] = prepare.validation_texts(source, told)
    found = audit.audit_folder(folder, **options, **limits)
    print(audit.format_audit(found))
    if found.thorough and not any(limits.values()):
        audit.store(Dataset.open(folder), found)  # runs on it tell that it was done, or refuse it
    return 0 if found.ok else 1
