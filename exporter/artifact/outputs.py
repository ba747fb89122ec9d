"""Outputs of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Task = Literal["classify", "embed", "tokens", "features", "segment", "pyramid"]
Answer = Literal["logits", "softmax", "sigmoid", "top5", "labels", "scores", "logits4"]
Content = Literal[
    "", "logits", "softmax", "sigmoid", "classes", "top5", "embedding", "tokens", "map", "pixel_logits", "labels",
    "pixel_scores",
]  # fmt: skip
"""What an output holds: logits; their softmax or sigmoid; the numbers of the five most probable classes, and with them
`top5`, their probabilities; a feature vector; tokens; the feature map of a stage; or for each pixel its logits, or the
number of its class, and with it the probability of that class. "" for an input."""
DENSE: tuple[Task, ...] = ("segment", "pyramid")
"""Tasks with a decoder behind the backbone: they take images of any size, and are combined with no other task."""
SEGMENT_ANSWERS: tuple[Answer, ...] = ("logits", "logits4", "labels", "scores")
WITH_LABELS: tuple[Answer, ...] = ("labels", "scores")
"""Answers that have the class of each pixel."""

PROBABILITIES: frozenset[Content] = frozenset({"softmax", "sigmoid", "top5", "pixel_scores"})


class OutputSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The outputs of a network: those of each task, in order.

    tasks: `classify`, the output of each head; `embed`, one feature vector an image; `tokens`, the feature
        vector and one token for each position of the last map; `features`, the map of each stage; `segment`, the class
        of each pixel; `pyramid`, the maps of a feature pyramid.
    answer: the output of each head: logits, their softmax or sigmoid, or the five most probable classes with their
        probabilities.
    l2: whether feature vectors have unit length.
    """

    tasks: tuple[Task, ...] = ("classify",)
    answer: Answer = "logits"
    l2: bool = False

    @property
    def text(self) -> str:
        """The outputs in words, by the options that give them: `classify,embed (l2)`."""
        tasks = ",".join(self.tasks)
        more: list[str] = [self.answer] if self.answer != "logits" else []
        more += ["l2"] if self.l2 else []
        return f"{tasks} ({', '.join(more)})" if more else tasks

    def contradiction(self) -> str:
        """Why the fields do not fit each other, as a message; "" where they do."""
        task = ",".join(self.tasks)
        if len(set(self.tasks)) < len(self.tasks):
            return f"--task {task}: give each task once"
        if len(self.tasks) > 1 and (dense := next((one for one in self.tasks if one in DENSE), "")):
            return f"--task {task}: {dense} cannot be combined with other tasks; give --task {dense}"
        if "segment" in self.tasks:
            return self._segment_contradiction()
        if self.answer in (*WITH_LABELS, "logits4"):
            return f"--output {self.answer}: it is of each pixel, for --task segment; leave it out"
        if self.answer != "logits" and "classify" not in self.tasks:
            return f"--output {self.answer}: task {task} has no classifier; leave it out, or add classify"
        if self.l2 and "embed" not in self.tasks:
            return f"--l2: task {task} has no single feature vector; leave it out, or add embed"
        return ""

    def _segment_contradiction(self) -> str:
        if self.answer not in SEGMENT_ANSWERS:
            *others, last = SEGMENT_ANSWERS
            return f"--output {self.answer}: task segment takes {', '.join(others)} or {last}"
        return "--l2: task segment has no feature vector; leave it out" if self.l2 else ""

    def named(self, heads: Sequence[str], strides: Sequence[int]) -> dict[str, Content]:
        """The name of each output, with what it holds.

        Args:
            heads: their names, where there are several.
            strides: of the stages, or of the maps of a pyramid: powers of 2, which count its levels (`p2` has 4).
        """
        outputs: dict[str, Content] = {}
        for task in self.tasks:
            if task == "segment":
                outputs |= {"labels": "labels"} if self.answer in WITH_LABELS else {"logits": "pixel_logits"}
                outputs |= {"scores": "pixel_scores"} if self.answer == "scores" else {}
            elif task == "classify":
                outputs |= self._of_heads(heads)
            elif task == "features":
                outputs |= {f"stage{number}": "map" for number in range(1, len(strides) + 1)}
            elif task == "pyramid":
                outputs |= {f"p{stride.bit_length() - 1}": "map" for stride in strides}
            else:
                outputs |= {"embedding": "embedding"} if task == "embed" else {"tokens": "tokens"}
        return outputs

    def _of_heads(self, heads: Sequence[str]) -> dict[str, Content]:
        outputs: dict[str, Content] = {}
        for head in heads or ("",):
            if self.answer == "top5":
                before = f"{head}_" if head else ""
                outputs |= {f"{before}classes": "classes", f"{before}probabilities": "top5"}
            else:
                holds: Content = self.answer if self.answer in ("softmax", "sigmoid") else "logits"
                outputs[head or ("logits" if holds == "logits" else "probabilities")] = holds
        return outputs
