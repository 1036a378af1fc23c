"""What a run's script needs of pgolf_core: definitions, methods and imports that its `main` reaches under the knobs."""

import ast
import copy
from collections import Counter
from functools import cache
from typing import Any

from pgolf.script.folding import LITERALS, Folding
from pgolf.script.parts import PACKAGE, SOURCES, Module, Name, all_names, module, references
from pgolf.script.trees import copied
from pgolf_core import knobs as knob_groups
from pgolf_core.artifact.codec import LIBRARIES
from pgolf_core.config import RunConfig
from pgolf_core.knobs import Group
from pgolf_core.quantization.primitives import QuantizedTensor
from pgolf_core.quantization.stored import FORMS
from pgolf_core.rules import QUANTIZERS
from pgolf_core.scheme import QuantScheme, parse_scheme

ENTRY: Name = (f"{PACKAGE}.train_gpt", "main")
CONFIG: Name = (f"{PACKAGE}.config", "RunConfig")
KNOBS = f"{PACKAGE}.knobs"
GROUPS = [name for name, cls in vars(knob_groups).items() if isinstance(cls, type) and issubclass(cls, Group)]
# Knobs that the environment or torchrun may set, so that one script serves all seeds and machines.
VARIABLES = {
    "seed": 'int(os.environ.get("SEED", 1337))',
    "data_path": 'os.environ.get("DATA_PATH", "data")',
    "tokenizer_path": 'os.environ.get("TOKENIZER_PATH", "")',
}
UNDECIDED = {*VARIABLES, "world_size", "grad_accum", "microbatches"}
# Definitions that look modules up on disk, and what they are in a script, where all that exist are registered.
REPLACED = {
    (f"{PACKAGE}.scheme", "scheme_class"): "scheme_class = SCHEMES.__getitem__",
    (f"{PACKAGE}.quantization.stored", "form"): "form = FORMS.__getitem__",
    (f"{PACKAGE}.model", "roles_by_name"): "roles_by_name = None",  # the script knows the roles
    (f"{PACKAGE}.files", "atomic_write"): "def atomic_write(path, content):\n    Path(path).write_bytes(content)",
    (f"{PACKAGE}.export_inputs", "_check_weights"): "def _check_weights(state, config):\n    pass",
    (
        f"{PACKAGE}.export",
        "_all_roles",
    ): "def _all_roles(state, roles):\n    return roles",  # the model is its own
    (f"{PACKAGE}.export", "_storable"): "def _storable(quantized):\n    return quantized",
    (f"{PACKAGE}.artifact.container", "_check_blocks"): "def _check_blocks(file, names):\n    pass",
}
# Device pickers where the knob names the device's kind.
_PICK = (f"{PACKAGE}.device", "pick_device")
PICKED = {
    "cpu": {_PICK: "def pick_device(config):\n    return torch.device('cpu')"},
    "cuda": {
        _PICK: "def pick_device(config):\n    if not torch.cuda.is_available():\n"
        "        raise SystemExit('this script needs CUDA')\n    return torch.device('cuda', local_rank())"
    },
}
# Definitions that a run never uses, unless a condition of its knobs holds.
UNUSED = {
    (f"{PACKAGE}.quantization.lowrank", "LowRank"): lambda c: (
        c.low_rank_residuals or (c.int8_residual_rank and c.allocation == "solve")
    ),
    (f"{PACKAGE}.quantization.primitives", "RankOne"): lambda c: c.int8_residual_rank,
    (f"{PACKAGE}.quantization.gptq", "gptq"): lambda c: c.gptq or c.allocation == "solve",
    (f"{PACKAGE}.quantization.gptq", "factorize_hessian"): lambda c: c.needs_calibration,
}
# Code of the artifact's format for parts that a file has not: what is in its place unless the condition holds.
FORMAT = f"{PACKAGE}.artifact.format"
ABSENT = {
    "_read_residual(quantized, name, own, about)": ("()", lambda c: c.int8_residual_rank),
    "_note_residuals(quantized, tensors, about)": ("None", lambda c: c.int8_residual_rank),
    "_word_of(name, own, about)": ("''", lambda c: not _integers_alone(c)),
    "_note_forms(quantized, about)": ("None", lambda c: not _integers_alone(c)),
}
# A script does not resume.
UNUSED_METHODS = {(f"{PACKAGE}.timer", "TrainTimer"): ("state_dict", "load_state_dict")}
# Errors made by the user of a script keep their messages; checks that only raise other errors are left out.
KEPT_ERRORS = {"SystemExit", "AllocationError"}
LIBRARY_CODECS = tuple(LIBRARIES)
CALLED_BY_TORCH = {"forward", "backward"}


class ScriptError(ValueError):
    """Code of which no script can be made; the message names it and what to change."""


class Reached:
    """kept: definition -> its statement, decided branches left out, classes whole; in the order they were reached.

    members: class -> its methods that are called, likewise. used: attributes that any of it reads. external: name ->
    its import from another package. literal: knobs are read by value.
    """

    def __init__(self, config: RunConfig, literal: bool):
        self.literal, self.facts = literal, facts_of(config)
        self.decided = {name: value for name, value in self.facts.items() if name not in UNDECIDED}
        self.variables = {"LIBRARIES": (LIBRARY_CODECS,), "polar_express": (config.muon_polar_express,)}
        self.variables |= {"codec": (config.codec, "lzma")} if config.codec != "auto" else {}  # headers are under lzma
        self.variables |= {} if config.window_size or config.document_mask else {"mask": (None,)}
        self.device = config.device.partition(":")[0]  # the kind, or "auto"
        self.variables |= {"device.type": (self.device,)} if self.device != "auto" else {}
        self.variables |= (
            {f"{name}.codec": (config.codec,) for name in ("s", "section")} if config.codec != "auto" else {}
        )
        self.variables |= {"lane": (None,)} if config.residual_lanes == 1 else {}
        self.replaced = (
            REPLACED
            | PICKED.get(self.device, {})
            | {name: f"{name[1]} = None" for name, used in UNUSED.items() if not used(config)}
        )
        self.replaced[f"{PACKAGE}.scheme", "parse_scheme"] = _schemes_as_code(config)
        for head, (value, used) in ABSENT.items():
            if not used(config):
                self.replaced[FORMAT, head.partition("(")[0]] = f"def {head}:\n    return {value}"
        self.kept: dict[Name, ast.stmt] = {}
        self.members: dict[Name, dict[str, ast.stmt]] = {}
        self.absent: dict[Name, frozenset[str]] = {}
        self.used: set[str] = set()
        self.external: dict[str, str] = {}
        todo = [ENTRY, *forms(config)]
        while todo:
            while todo:
                todo += self._keep(todo.pop())
            todo = [name for cls in self.members for name in self._keep_members(cls)]
        self._check_names()

    def _check_names(self) -> None:
        """Raise ScriptError if two modules define one name differently: a script has one namespace."""
        known: dict[str, Name] = {}
        for name in self.kept:
            other = known.setdefault(name[1], name)
            is_second = other != name and not name[1].startswith("*")
            if is_second and ast.dump(self.kept[other]) != ast.dump(self.kept[name]):
                raise ScriptError(f"{name[1]} is defined in {other[0]} and in {name[0]}; rename one")
            if name[1] in self.external:
                raise ScriptError(f"{name[1]} of {name[0]} is also {self.external[name[1]]!r}; rename it")

    @property
    def modules(self) -> list[str]:
        """Modules of what is kept, each after those that it imports."""
        ordered: dict[str, None] = {}

        def add(name: str) -> None:
            if name not in ordered:
                for origin, _ in module(name).imports.values():
                    add(origin)
                ordered[name] = None

        for name, _ in self.kept:
            add(name)
        own = {name for name, _ in self.kept}
        return [name for name in ordered if name in own]

    def knobs(self) -> dict[str, Any]:
        """Fields of the script's config: knobs and what follows from them, as far as they are read."""
        endings = tuple(name[1:] for name in self.used if name.startswith("*"))
        own = self.members[CONFIG]
        return {
            name: value
            for name, value in self.facts.items()
            if name not in own and (self._is_read(name) or (endings and name.endswith(endings)))
        }

    def _is_read(self, fact: str) -> bool:
        """True of a knob that the script reads, and not as a literal."""
        by_value = self.literal and fact in self.decided and isinstance(self.facts[fact], LITERALS)
        return fact in self.used and not by_value

    def _keep(self, name: Name) -> list[Name]:
        """Keep a definition; returns those that it refers to."""
        if name in self.kept:
            return []
        origin = module(name[0])
        if name == CONFIG:
            self.kept[name], self.members[name] = ast.Pass(), {}
            own = {name: f"from dataclasses import {name}" for name in ("dataclass", "replace")}
            self.external |= {"os": "import os"} | own
            return []
        statement = parsed(self.replaced[name]) if name in self.replaced else origin.definitions[name[1]]
        if isinstance(statement, ast.ClassDef):
            self.kept[name], self.members[name] = statement, {}
            self.absent[name] = self._always_none(statement, origin)
            found = self._refer(origin, shell_of(statement))
        else:
            self.kept[name] = self._folded(statement, origin)
            found = self._refer(origin, self.kept[name])
        return found + [(origin.name, effect) for effect in origin.definitions if effect.startswith("*")]

    def _keep_members(self, cls: Name) -> list[Name]:
        """Keep the methods of a class that are called by now; returns the definitions that they refer to."""
        origin = module(KNOBS if cls == CONFIG else cls[0])
        body = _config_methods(self.facts) if cls == CONFIG else self.kept[cls].body
        found = []
        for method in body:
            if not isinstance(method, ast.FunctionDef) or method.name in self.members[cls]:
                continue
            name = method.name
            called = name in self.used or name in CALLED_BY_TORCH or (name.startswith("__") and name.endswith("__"))
            if called and name not in UNUSED_METHODS.get(cls, ()):
                folded = self._folded(method, origin, self.absent.get(cls, frozenset()))
                self.members[cls][name] = folded
                found += self._refer(origin, folded)
        return found

    def _folded(self, statement: ast.stmt, origin: Module, absent: frozenset[str] = frozenset()) -> ast.stmt:
        """The statement without the branches that the knobs decide; code outside the package stays whole."""
        if origin.name not in SOURCES:
            return statement
        names, attributes, _ = references(statement)
        knobs = tuple((name, self.decided[name]) for name in sorted(attributes) if name in self.decided)
        names = names | {known for known in self.variables if known.partition(".")[2] in attributes}
        variables = tuple((name, self.variables[name]) for name in sorted(names) if name in self.variables)
        return folded(statement, knobs, variables, absent & attributes, self.literal, origin.name == KNOBS)

    def _always_none(self, cls: ast.ClassDef, origin: Module) -> frozenset[str]:
        """Attributes that a class sets to None under the knobs, and to nothing else."""
        stores, nones = Counter(), Counter()
        for method in cls.body:
            if isinstance(method, ast.FunctionDef):
                for node in ast.walk(self._folded(method, origin)):
                    match node:
                        case ast.Attribute(ast.Name("self"), attribute, ast.Store()):
                            stores[attribute] += 1
                        case ast.Assign([ast.Attribute(ast.Name("self"), attribute)], ast.Constant(None)):
                            nones[attribute] += 1
        return frozenset(name for name in nones if nones[name] == stores[name])

    def _refer(self, origin: Module, node: ast.AST) -> list[Name]:
        """Note what code of a module uses; returns the definitions that it reads."""
        names, attributes, imported = references(node)
        self.used |= attributes
        if not self.literal:  # for readers: no annotation is evaluated
            self.external |= {name: origin.external[name] for name in all_names(node) & origin.external.keys()}
        found = sorted(imported)
        for name in sorted(names):
            if name in origin.imports:
                found.append(origin.imports[name])
            elif name in origin.definitions:
                found.append((origin.name, name))
            elif name in origin.external:
                known = self.external.setdefault(name, origin.external[name])
                assert known == origin.external[name], f"{origin.name}: {origin.external[name]}, elsewhere {known}"
        return [_resolved(name) for name in found]


# Scripts of one process have most parts in common: each is made once per values of the knobs that it reads.


@cache
def parsed(text: str) -> ast.stmt:
    return ast.parse(text).body[0]


@cache
def shell_of(cls: ast.ClassDef) -> ast.ClassDef:
    """A class without its methods."""
    shell = copy.copy(cls)
    shell.body = [s for s in cls.body if not isinstance(s, ast.FunctionDef)]
    return shell


@cache
def folded(
    statement: ast.stmt, knobs: tuple, variables: tuple, absent: frozenset[str], literal: bool, in_config: bool
) -> ast.stmt:
    """The statement under these values of what it reads; see Folding."""
    folding = Folding(dict(knobs), dict(variables), KEPT_ERRORS, literal)
    folding.absent, folding.in_config = absent, in_config
    return folding.visit(copied(statement))


def _resolved(name: Name) -> Name:
    """Where a name is defined that a module may have imported from another; every group of knobs is the config."""
    if name[0] == KNOBS and name[1] in GROUPS:
        return CONFIG
    origin = module(name[0])
    return name if name[1] in origin.definitions else _resolved(origin.imports[name[1]])


def facts_of(config: RunConfig) -> dict[str, Any]:
    """Knobs, and properties that follow from them: name -> value; eval_seq_len is resolved, as in config.eval."""
    facts = config.model_dump() | {"eval_seq_len": config.eval_window}
    for group in GROUPS:
        for name, member in vars(getattr(knob_groups, group)).items():
            if isinstance(member, property) and name not in UNDECIDED:
                value = getattr(config, name)
                facts[name] = tuple(value) if isinstance(value, list) else value
    return facts


def _config_methods(facts: dict[str, Any]) -> list[ast.FunctionDef]:
    """Methods of the groups of knobs that are more than a value."""
    own = module(KNOBS).definitions
    return [
        method
        for name, group in own.items()
        if name in GROUPS
        for method in group.body
        if isinstance(method, ast.FunctionDef) and method.name not in facts
    ]


def _schemes(config: RunConfig) -> dict[str, QuantScheme]:
    """Text of a quantizer knob -> its scheme, of those that the file needs."""
    texts = {getattr(config, name) for name in QUANTIZERS} - {""} if config.allocation != "solve" else ()
    return {text: parse_scheme(text) for text in sorted(texts)}


def _schemes_as_code(config: RunConfig) -> str:
    """parse_scheme for the run's knobs alone: schemes are dataclasses, whose repr makes them."""
    schemes = _schemes(config)
    made = ", ".join(f"{text!r}: {scheme!r}" for text, scheme in schemes.items())
    value = repr(*schemes.values()) if len(schemes) == 1 else f"{{{made}}}[text]"
    return f"def parse_scheme(text):\n    return {value}"


def _integers_alone(config: RunConfig) -> bool:
    """Whether every tensor is stored as integers or floats."""
    return not any(scheme.stored in FORMS and scheme.stored != "int" for scheme in _schemes(config).values())


def forms(config: RunConfig) -> list[Name]:
    """Classes that code finds by a word: schemes that the quantizer knobs name, and their stored forms."""
    if config.allocation == "solve":
        return []
    schemes = _schemes(config).values()
    stored = {FORMS[scheme.stored] for scheme in schemes if scheme.stored in FORMS}
    classes = {type(scheme) for scheme in schemes} | stored | {QuantizedTensor}
    return sorted((cls.__module__, cls.__name__) for cls in classes)
