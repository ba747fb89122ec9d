"""Labels in every form that people keep them in, and those that can be read in two ways."""

import json
import re

import pytest

from exporter.errors import BadRequest
from exporter.model.config import read_config
from exporter.model.labels import read_labels

NAMES = ("cat", "dog", "barn owl")
FILES = {
    "a.txt": "cat\ndog\n\n barn owl \n",
    "bom.txt": "\ufeffcat\ndog\nbarn owl",
    "numbers.txt": "0 cat\n1 dog\n2 barn owl\n",
    "from_one.txt": "1: cat\n2: dog\n3: barn owl\n",
    "tabs.txt": "2\tbarn owl\n0\tcat\n1\tdog\n",
    "list.json": '["cat", "dog", "barn owl"]',
    "numbers.json": '{"0": "cat", "2": "barn owl", "1": "dog"}',
    "names.json": '{"dog": 1, "cat": 0, "barn owl": 2}',
    "index.csv": "index,name\n1,dog\n0,cat\n2,barn owl\n",
    "class.csv": "class,label\n0,cat\n1,dog\n2,barn owl\n",
    "turned.csv": "label,class\n0,cat\n1,dog\n2,barn owl\n",
    "id.csv": "ID,Class Name,color\n1,cat,red\n2,dog,blue\n3,barn owl,red\n",
    "column.csv": "name\ncat\ndog\nbarn owl\n",
    "table.tsv": "id\tname\n0\tcat\n1\tdog\n2\tbarn owl\n",
    "bare.csv": "0,cat\n1,dog\n2,barn owl\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_labels_in_every_form(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    assert read_labels(tmp_path / name) == NAMES


WORDNET = {
    "a.txt": "n01440764 tench\nn01443537 goldfish",
    "numbers.txt": "0 n01440764 tench\n1 n01443537 goldfish",
    "keras.json": '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}',
    "a.csv": "index,wnid,name\n0,n01440764,tench\n1,n01443537,goldfish",
}


@pytest.mark.parametrize("name", WORDNET)
def test_wordnet_ids_stay_beside_the_words(name, tmp_path):
    (tmp_path / name).write_text(WORDNET[name])
    assert read_labels(tmp_path / name) == ("n01440764 tench", "n01443537 goldfish")


def test_labels_of_which_some_begin_with_numbers_are_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_text("7 up\ncola\n4\n")
    assert read_labels(tmp_path / "a.txt") == ("7 up", "cola", "4")
    (tmp_path / "a.txt").write_text("0\n1\n2\n")
    assert read_labels(tmp_path / "a.txt") == ("0", "1", "2")


TWO_WAYS = {
    "a.txt": ("7 up\n12 angry men\n", "the first line is 'up' for class 7, or the label '7 up' for class 0"),
    "b.txt": ("0 cat\n0 dog\n", "do not count from 0 or 1"),
    "a.json": ('{"1": "0", "0": "1"}', "class 1 is '0', or class 0 is '1'"),
    "b.json": ('{"0": "cat", "2": "dog"}', "do not count from 0 or 1"),
    "c.json": ('{"cat": "dog"}', 'expected {"0": "cat"} or {"cat": 0}'),
    "a.csv": ("name,description\ncat,it purrs\ndog,it barks\n", "name ('cat' first) or description ('it purrs' first)"),
    "b.csv": ("index,id,name\n0,1,cat\n1,0,dog\n", "index ('0' first) or id ('1' first)"),
    "c.csv": ("index,name\n0,cat,dog\n", "another number of columns than the 2 of the header"),
    "empty.txt": ("\n \n", "no labels in it; expected one a line"),
    "broken.json": ("[1", "labels cannot be read"),
}


@pytest.mark.parametrize("name", TWO_WAYS)
def test_labels_that_can_be_read_in_two_ways_or_in_none_are_refused(name, tmp_path):
    text, message = TWO_WAYS[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(BadRequest, match=re.escape(message)):
        read_labels(tmp_path / name)


TIMM = {"pretrained_cfg": {"input_size": [3, 64, 64]}}
CONFIGS = {
    "id2label": {"id2label": {"0": "cat", "1": "dog", "2": "barn owl"}},
    "out of order": {"id2label": {"2": "barn owl", "0": "cat", "1": "dog"}},
    "label2id": {"label2id": {"dog": 1, "cat": 0, "barn owl": 2}},
    "text numbers": {"label2id": {"dog": "1", "cat": "0", "barn owl": "2"}},
    "placeholders": {"id2label": {"0": "LABEL_0"}, "label2id": {"cat": 0, "dog": 1, "barn owl": 2}},
    "list": TIMM | {"label_names": list(NAMES)},
    "dictionary": TIMM | {"label_names": {str(index): name for index, name in enumerate(NAMES)}},
    "nested": {"pretrained_cfg": {"input_size": [3, 64, 64], "label_names": list(NAMES)}},
    "overridden": {"pretrained_cfg": {"label_names": ["a"]}, "label_names": list(NAMES)},
}


def config_of(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_have_labels_as_list_or_dictionary(name, tmp_path):
    config = config_of(tmp_path, CONFIGS[name])
    assert config.labels == NAMES
    assert config.origins["labels"] == "config.json"


def test_descriptions_stand_beside_wordnet_ids(tmp_path):
    names = ["n01440764", "n01443537"]
    config = TIMM | {"label_names": names, "label_descriptions": dict(zip(names, ("tench", "goldfish"), strict=True))}
    assert config_of(tmp_path, config).labels == ("n01440764 tench", "n01443537 goldfish")


def test_classes_of_the_same_name_are_no_contradiction(tmp_path):
    """Of two cranes, `label2id` keeps the last."""
    config = {"id2label": {"0": "crane", "1": "cow", "2": "crane"}, "label2id": {"cow": 1, "crane": 2}}
    assert config_of(tmp_path, config).labels == ("crane", "cow", "crane")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "cat"}, "label2id": {"dog": 0}}, "id2label says 'cat' for class 0, but label2id 'dog'"),
        ({"id2label": {"0": "cat", "2": "dog"}}, "do not count from 0"),
        ({"id2label": {"0": "cat"}, "num_labels": 2}, "num_labels is 2, but there are 1 labels"),
        (TIMM | {"num_classes": 4, "label_names": ["cat"]}, "num_classes is 4, but there are 1 labels"),
    ],
)
def test_labels_that_contradict_each_other_are_refused_with_both(config, message, tmp_path):
    with pytest.raises(BadRequest, match=message):
        config_of(tmp_path, config)
