"""What a run's script needs of pgolf_core: definitions, methods and imports that its `main` reaches under the knobs."""

import ast
import copy
from typing import Any

from pgolf.script.folding import Folding
from pgolf.script.parts import PACKAGE, Module, Name, copied, module, references
from pgolf_core import knobs as knob_groups
from pgolf_core.artifact.codec import LIBRARIES
from pgolf_core.config import RunConfig
from pgolf_core.knobs import Group
from pgolf_core.quantization.primitives import QuantizedTensor
from pgolf_core.quantization.stored import FORMS
from pgolf_core.scheme import parse_scheme

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
    (f"{PACKAGE}.export_inputs", "_check_weights"): "def _check_weights(state, config):\n    pass",
}
# Definitions that a run never uses, unless a condition of its knobs holds.
UNUSED = {
    (f"{PACKAGE}.quantization.lowrank", "LowRank"): lambda c: (
        c.low_rank_residuals or (c.int8_residual_rank and c.allocation == "solve")
    ),
    (f"{PACKAGE}.quantization.primitives", "RankOne"): lambda c: (
        c.int8_residual_budget_bytes and not c.low_rank_residuals
    ),
    (f"{PACKAGE}.quantization.gptq", "gptq"): lambda c: c.gptq or c.allocation == "solve",
    (f"{PACKAGE}.quantization.gptq", "factorize_hessian"): lambda c: c.needs_calibration,
}
# A script does not resume.
UNUSED_METHODS = {(f"{PACKAGE}.timer", "TrainTimer"): ("state_dict", "load_state_dict")}
# Errors that stay, with their messages: mistakes of whoever runs the script. Checks against other errors go.
KEPT_ERRORS = {"SystemExit", "AllocationError"}
CALLED_BY_TORCH = {"forward", "backward"}


class Reached:
    """kept: definition -> its statement, decided branches left out, classes whole; in the order they were reached.

    members: class -> its methods that are called, likewise. used: attributes that any of it reads. external: name ->
    its import from another package. literal: knobs are read by value.
    """

    def __init__(self, config: RunConfig, literal: bool):
        self.facts = facts_of(config)
        decided = {name: value for name, value in self.facts.items() if name not in UNDECIDED}
        names = {"LIBRARIES": (LIBRARIES,), "polar_express": (config.muon_polar_express,)}
        names |= {"codec": (config.codec, "lzma")} if config.codec != "auto" else {}  # headers are under lzma
        names |= {} if config.window_size or config.document_mask else {"mask": (None,)}
        self.folding = Folding(decided, names, KEPT_ERRORS, literal)
        self.replaced = REPLACED | {name: f"{name[1]} = None" for name, used in UNUSED.items() if not used(config)}
        self.kept: dict[Name, ast.stmt] = {}
        self.members: dict[Name, dict[str, ast.stmt]] = {}
        self.absent: dict[Name, set[str]] = {}
        self.used: set[str] = set()
        self.external: dict[str, str] = {}
        todo = [ENTRY, *_forms(config)]
        while todo:
            while todo:
                todo += self._keep(todo.pop())
            todo = [name for cls in self.members for name in self._keep_members(cls)]

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
            if name not in own and (name in self.used or (endings and name.endswith(endings)))
        }

    def _keep(self, name: Name) -> list[Name]:
        """Keep a definition; returns those that it refers to."""
        if name in self.kept:
            return []
        origin = module(name[0])
        if name == CONFIG:
            self.kept[name], self.members[name] = ast.Pass(), {}
            self.external |= {"os": "import os"} | {
                name: f"from dataclasses import {name}" for name in ("dataclass", "replace")
            }
            return []
        statement = ast.parse(self.replaced[name]).body[0] if name in self.replaced else origin.definitions[name[1]]
        if isinstance(statement, ast.ClassDef):
            self.kept[name], self.members[name] = statement, {}
            shell = copy.copy(statement)
            shell.body = [s for s in statement.body if not isinstance(s, ast.FunctionDef)]
            found = self._refer(origin, shell)
            self.absent[name] = self._always_none(statement)
        else:
            self.folding.absent, self.folding.in_config = set(), False
            self.kept[name] = self.folding.visit(copied(statement))
            found = self._refer(origin, self.kept[name])
        return found + [(origin.name, effect) for effect in origin.definitions if effect.startswith("*")]

    def _keep_members(self, cls: Name) -> list[Name]:
        """Keep the methods of a class that are called by now; returns the definitions that they refer to."""
        origin = module(KNOBS if cls == CONFIG else cls[0])
        body = _config_methods(self.facts) if cls == CONFIG else self.kept[cls].body
        self.folding.absent, self.folding.in_config = self.absent.get(cls, set()), cls == CONFIG
        found = []
        for method in body:
            if not isinstance(method, ast.FunctionDef) or method.name in self.members[cls]:
                continue
            name = method.name
            if name in UNUSED_METHODS.get(cls, ()):
                continue
            if name in self.used or name in CALLED_BY_TORCH or (name.startswith("__") and name.endswith("__")):
                self.members[cls][name] = self.folding.visit(copied(method))
                found += self._refer(origin, self.members[cls][name])
        return found

    def _always_none(self, cls: ast.ClassDef) -> set[str]:
        """Attributes that the constructor sets to None under the knobs, and that nothing else sets."""
        self.folding.absent, self.folding.in_config = set(), False
        assigned: dict[str, list[ast.expr]] = {}
        for method in cls.body:
            if isinstance(method, ast.FunctionDef):
                for node in ast.walk(self.folding.visit(copied(method))):
                    match node:
                        case ast.Assign([ast.Attribute(ast.Name("self"), attribute)], value):
                            assigned.setdefault(attribute, []).append(value)
        return {
            name
            for name, values in assigned.items()
            if all(isinstance(value, ast.Constant) and value.value is None for value in values)
        }

    def _refer(self, origin: Module, node: ast.AST) -> list[Name]:
        """Note what code of a module uses; returns the definitions that it reads."""
        names, attributes, imported = references(node)
        self.used |= attributes
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


def _forms(config: RunConfig) -> list[Name]:
    """Classes that code finds by a word: schemes that the quantizer knobs name, and their stored forms."""
    if config.allocation == "solve":
        return []
    names = [name for name in RunConfig.model_fields if name.endswith("quantizer")]
    schemes = [parse_scheme(getattr(config, name)) for name in names if getattr(config, name)]
    stored = {FORMS[scheme.stored] for scheme in schemes if scheme.stored in FORMS}
    classes = {type(scheme) for scheme in schemes} | stored | {QuantizedTensor}
    return sorted((cls.__module__, cls.__name__) for cls in classes)
