"""The section `[data]` of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from blip2edge.errors import ConfigError, some
from blip2edge.training.fields import (
    NOT_NEGATIVE,
    OBJECTS,
    POSITIVE,
    SHARE,
    RecipeSection,
    ValidValues,
    one_of,
    up_to,
)

MIXTURE = "mixture"
DATA_KINDS = ("scenes", "coco-captions", "coco-vqa", "karpathy", "table", "folder", "shards", "parquet", MIXTURE)
WITHOUT_SHOTS = ("scenes", "shards", "parquet", MIXTURE)
LEFT_RIGHT = ("left", "right", "leftmost", "rightmost", "clockwise", "counterclockwise", "anticlockwise")
_MOST_SCENES = up_to(100_000_000)  # the order of a pass is a list in memory
_MOST_BUFFERED = up_to(100_000_000)
_CROP = ValidValues(lambda value: bool(0 < value <= 1), "be greater than 0 and at most 1")


@dataclass(frozen=True)
class DataConfig(RecipeSection):
    """The training data. If a recipe has several tables `[[data]]`, their data sets are mixed."""

    kind: Annotated[str, one_of(*DATA_KINDS)] = "scenes"
    """"scenes": generated scenes; "coco-captions" and "coco-vqa": COCO's JSON files; "karpathy": `dataset_coco.json`;
    "table": rows of JSON lists (LAVIS, LLaVA), JSONL, CSV, TSV or an imagefolder; "folder": pictures, each with a text
    file of the same name; "shards": WebDataset's tar files; "parquet": Parquet files; "mixture": set by `[[data]]`."""
    path: str = ""
    """Path of the data, relative to the recipe: a JSON file (for VQA the file with the questions), a table, a folder,
    or shards. Shards are given as `part-*.tar`, as `part-{000..127}.tar` or by their directory; they may be in an
    object store (`s3://…`)."""
    images: str = ""
    """Directory of the pictures of a JSON file or a table. If it is empty, the pictures are searched in the directory
    of the file and in COCO's usual folders next to it."""
    annotations: str = ""
    """File of the answers to VQA's questions; if it is empty, the file with VQA's usual name beside `path`."""
    splits: tuple[str, ...] = ("train", "restval")
    """Splits of Karpathy's file that are read."""
    image_column: str = ""
    """Column of a table that has the pictures. If it is empty, the columns named in docs/data.md are tried in order."""
    text_column: str = ""
    """Column of a table that has the captions. If it is empty, the columns named in docs/data.md are tried in order."""
    question: str = "Question: {} Short answer:"
    """Template of a question; the braces are replaced by the question."""
    more_questions: tuple[str, ...] = ()
    """Further templates of a question; each sample draws one of all templates."""
    max_broken: Annotated[int, NOT_NEGATIVE] = 100
    """Largest number of samples with a missing or broken picture or text. They are skipped and reported; one more is
    an error."""
    shuffle_buffer: Annotated[int, POSITIVE, _MOST_BUFFERED] = 1000
    """Number of samples in a block. Shards are read block by block, and the samples of a block are shuffled."""
    copies_gib: Annotated[int, POSITIVE] = 64
    """Largest size in GiB of the local copies of packed shards and of an object store's files, in the user's cache."""
    ratio: Annotated[float, NOT_NEGATIVE] = 0.0
    """Share of this set in a mixture, relative to the ratios of the other sets. If it is 0 in all sets, the square
    roots of the sets' sizes are the ratios."""
    size: Annotated[int, NOT_NEGATIVE] = 0
    """Number of samples, for a mixture without ratios. If it is 0, the samples are counted, which is impossible for
    shards and unlimited scenes."""
    shots: Annotated[int, NOT_NEGATIVE, OBJECTS] = 0
    """Examples (few-shot) before each sample, drawn from other pictures of the same set; no loss is computed on them.
    Only for bridge = "flamingo", and not for shards, Parquet files and scenes."""
    crop: Annotated[float, _CROP] = 1.0
    """Smallest share of a picture's area that a random crop keeps; 1: no crop."""
    flip: Annotated[float, SHARE] = 0.0
    """Share of pictures that are mirrored. A picture whose texts contain a word of `flip_except` is never mirrored."""
    flip_except: tuple[str, ...] = LEFT_RIGHT
    """Words such as "left". A picture whose texts contain one of them is not mirrored: the text would become wrong."""
    count: Annotated[int, NOT_NEGATIVE, _MOST_SCENES] = 0
    """Number of generated scenes, shown pass after pass, so that features can be cached; 0: every scene is new."""
    series: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the scenes if `count` is above 0. If `count` is 0, their seed is made from the recipe's seed and the
    phase."""
    prompts: tuple[str, ...] = ("a photo of", "a picture of")
    """Short prompts, or instructions. In training, some captions follow one of these prompts (`prompt_share`)."""
    prompt_share: Annotated[float, SHARE] = 0.2
    """Share of captions that follow one of the prompts; the others follow the empty prompt."""
    sets: tuple[DataConfig, ...] = ()
    """The data sets of a mixture, each with the keys of this section."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == MIXTURE:
            self._check_mixture()
        elif self.kind != "scenes" and not self.path:
            raise ConfigError(
                f"[{self.section}] kind = {self.kind!r} expects a path, got none", f'add path = "…" to [{self.section}]'
            )
        if self.shots and self.kind in WITHOUT_SHOTS:
            raise ConfigError(
                f"[{self.section}] shots = {self.shots} does not work with kind = {self.kind!r}: few-shot examples are"
                " drawn from a list of all samples",
                "leave shots out, or give the data as a JSON file, a table or a folder",
            )
        for template in self.questions:
            if template.count("{}") != 1:
                name = "question" if template == self.question else "more_questions"
                raise ConfigError(
                    f"[{self.section}] {name} must contain {{}} once, in the place of the question, not {template!r}"
                )
        if self.prompt_share > 0 and not self.prompts:
            raise ConfigError(
                f"[{self.section}] prompts is empty, but prompt_share is above 0",
                "set prompts, or set prompt_share to 0",
            )

    def _check_mixture(self) -> None:
        if len(self.sets) < 2:
            why = "ratio balances a mixture: " if self.sets else ""
            raise ConfigError(
                f"[[{self.section}]] {why}expected at least two data sets to mix, got {len(self.sets)}",
                f"leave ratio out, or write [[{self.section}]] for each data set",
            )
        if any(each.kind == MIXTURE for each in self.sets):
            raise ConfigError(f"[[{self.section}]] a set of a mixture cannot be a mixture itself")
        missing = [f"{at} ({each.path or each.kind})" for at, each in enumerate(self.sets, 1) if not each.ratio]
        if 0 < len(missing) < len(self.sets):
            raise ConfigError(
                f"[[{self.section}]] expected a ratio above 0 in every set or in none, got none in set"
                f" {some(missing)} of {len(self.sets)} sets",
                "set ratio in every set, or in none to mix by the square roots of the sizes",
            )

    @property
    def questions(self) -> tuple[str, ...]:
        """Returns all templates with which a question can be formatted."""
        return (self.question, *self.more_questions)

    @property
    def parts(self) -> tuple[DataConfig, ...]:
        """Returns the data sets of a mixture; without a mixture, only this section."""
        return self.sets or (self,)

    @property
    def only_scenes(self) -> bool:
        """Returns whether all pictures are generated scenes."""
        return all(part.kind == "scenes" for part in self.parts)

    @property
    def most_shots(self) -> int:
        """Returns the largest number of few-shot examples before a sample, over all data sets."""
        return max(part.shots for part in self.parts)

    @property
    def augments(self) -> bool:
        """Returns whether pictures are changed at random (cropped or mirrored)."""
        return any(part.crop < 1 or part.flip > 0 for part in self.parts)

    @classmethod
    def of_tables(cls, sets: Sequence[DataConfig]) -> DataConfig:
        """Returns the data of a recipe that has several tables `[[data]]`: their mixture; for one table, its data set.

        Args:
            sets: The sets, in the recipe's order.
        """
        if cls is not DataConfig:
            raise ConfigError(f"[[{cls.__name__.removesuffix('Config').lower()}]] expected one table, got a list")
        if len(sets) == 1 and sets[0].ratio == 0:
            return sets[0]
        prompts = tuple(dict.fromkeys(prompt for each in sets for prompt in each.prompts))
        share = max((each.prompt_share for each in sets), default=0.0)
        return cls(kind=MIXTURE, sets=tuple(sets), prompts=prompts, prompt_share=share)
