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
    "unknown_name.csv": "no,label\n2,dog\n1,cat\n3,barn owl\n",
    "pandas.csv": "Unnamed: 0,label\n1,dog\n0,cat\n2,barn owl\n",
    "pandas_index.csv": ",label\n1,dog\n0,cat\n2,barn owl\n",
    "same_twice.csv": ",index,label\n1,1.0,dog\n0,0.0,cat\n2,2.0,barn owl\n",
    "floats.csv": "index,name\n1.0,dog\n0.0,cat\n2.0,barn owl\n",
    "bare_turned.csv": "dog,1\ncat,0\nbarn owl,2\n",
    "bare_quoted.csv": '1,"dog"\n0,"cat"\n2,"barn owl"\n',
    "quoted.csv": '"cat"\n"dog"\n"barn owl"\n',
    "semicolons.csv": "index;name\n1;dog\n0;cat\n2;barn owl\n",
    "bare_semicolons.csv": "1;dog\n0;cat\n2;barn owl\n",
    "tabs.csv": "index\tname\n1\tdog\n0\tcat\n2\tbarn owl\n",
    "table.txt": "index,name\n1,dog\n0,cat\n2,barn owl\n",
    "tab_table.txt": "id\tname\n1\tcat\n2\tdog\n3\tbarn owl\n",
    "last.txt": "dog 1\ncat 0\nbarn owl 2\n",
    "last_colon.txt": "dog: 1\ncat: 0\nbarn owl: 2\n",
    "last_comma.txt": "dog,1\ncat,0\nbarn owl,2\n",
    "dash_between.txt": "0 - cat\n1 - dog\n2 - barn owl\n",
    "equals.txt": "0=cat\n1 = dog\n2=barn owl\n",
    "floats.txt": "1.0 dog\n0.0 cat\n2.0 barn owl\n",
    "quoted.txt": '0,"cat"\n1,"dog"\n2,"barn owl"\n',
    "dashes.txt": "- cat\n- dog\n- barn owl\n",
    "names.yaml": "names:\n  1: dog\n  0: 'cat'\n  2: \"barn owl\"\n",
    "list.yaml": "names:\n- cat\n- dog\n- barn owl\n",
    "windows.txt": "cat\r\ndog\r\nbarn owl\r\n",
    "old_mac.txt": "cat\rdog\rbarn owl\r",
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
    "score.csv": (
        "score,label\n7,cat\n3,dog\n",
        "column 'score' holds numbers (7 first) that do not count from 0 or 1",
    ),
    "three.csv": (",no,label\n0,1,cat\n1,0,dog\n", " ('0' first) or no ('1' first) could hold the labels"),
    "rank.csv": ("index,name,no\n0,cat,1\n1,dog,0\n", "index ('0' first) or no ('1' first) could hold the labels"),
    "minus.csv": ("index,name\n-1,cat\n0,dog\n", "do not count from 0 or 1: line 2 has -1"),
    "gap.csv": ("index,name\n0.0,cat\n\n3.0,dog\n", "do not count from 0 or 1: line 4 has 3"),
    "word.csv": ("index,name\n0,cat\n,dog\n", "line 3: index is '', not a whole number"),
    "twice.csv": ("name,name\ncat,feline\n", "two columns are called 'name'"),
    "no_label.csv": ("index,name\n0,cat\n1,\n", "line 3 has an empty label"),
    "bare_words.csv": ("cat,animal\ndog,animal\n", "2 columns separated by ',' (cat, animal), and no header"),
    "bare_both.csv": ("0,1\n1,0\n", "2 columns separated by ','"),
    "bare_gap.csv": ("cat,0\ndog,2\n", "do not count from 0 or 1: line 2 has 2"),
    "bare_three.csv": ("0,cat,red\n1,dog,blue\n", "3 columns separated by ','"),
    "bare_some.csv": ("cat\ntabby, tabby cat\n", "line 2 has 2 cells"),
    "bare_words.tsv": ("cat;animal\ndog;animal\n", "2 columns separated by ';'"),
    "quote.csv": ('index,name\n0,"cat\n1,dog\n', "line 2: unexpected end of data"),
    "swallowed.csv": ('index,name\n0,"cat\n1,dog\n2,"\n', "line 2: a quote does not close"),
    "header.txt": ("class no\n0 cat\n1 dog\n", "line 1, 'class no', has no number, but line 2 has 0"),
    "minus.txt": ("-1 cat\n0 dog\n", "line 1 has -1"),
    "last_gap.txt": ("cat 0\ndog 2\n", "do not count from 0 or 1: line 2 has 2"),
    "both.txt": ("0 cat 1\n1 dog 0\n", "line 1, '0 cat 1', is class 0 or class 1"),
    "some_dashes.txt": ("- cat\ndog\n", "line 1 begins with '-', but line 2, 'dog', does not"),
    "comment.txt": ("# animals\ncat\ndog\n", "line 1, '# animals', has a comment or a label"),
    "data.yaml": ("path: data\nnames:\n  0: cat\n", "line 2 is 'names:'"),
    "words.yaml": ("names:\n  cat\n  dog\n", "line 2, 'cat', has neither number nor '-'"),
    "columns.txt": ("cat\tblue\ndog\tred\n", "line 1, 'cat\\tblue', has columns separated by a tab"),
    "twice.json": ('{"0": "cat", "0": "dog"}', "'0' is 'cat' and 'dog'"),
    "null.json": ('["cat", null]', "null is not a label"),
    "true.json": ('["cat", true]', "true is not a label"),
    "empty.json": ('["cat", ""]', "class 1 has an empty label"),
    "same.json": ('["cat", "cat"]', "class 0 and class 1 are both 'cat'"),
    "same.txt": ("a\n\na\nb\nc\n", "line 1 and line 3 are both 'a'"),
    "same.csv": ("index,name\n1,a\n0,a\n", "line 3 and line 2 are both 'a'"),
}


@pytest.mark.parametrize("name", TWO_WAYS)
def test_labels_that_can_be_read_in_two_ways_or_in_none_are_refused(name, tmp_path):
    text, message = TWO_WAYS[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(BadRequest, match=re.escape(message)):
        read_labels(tmp_path / name)


def test_of_a_thousand_labels_two_may_be_the_same_as_in_imagenet(tmp_path):
    names = [f"bird {chr(0x4E00 + number)}" for number in range(999)]
    (tmp_path / "a.txt").write_text("\n".join([*names, names[0]]), "utf-8")
    assert read_labels(tmp_path / "a.txt")[-1] == names[0]
    (tmp_path / "a.txt").write_text("\n".join([*names[1:], names[1]]), "utf-8")
    with pytest.raises(BadRequest, match="line 1 and line 999 are both"):
        read_labels(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "names", [("class 1", "class 2"), ("Boeing 737", "Airbus 320"), ("BMW X5 2007", "Audi S4 2007"), ("R2-D2", "C-3PO")]
)
def test_labels_that_end_in_a_number_of_their_own_keep_it(names, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(names))
    assert read_labels(tmp_path / "a.txt") == names


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_only_newlines_end_a_label(name, tmp_path):
    names = ("cat\u2028tabby", "dog\u0085hound", "owl\x0cbarn")
    (tmp_path / name).write_text("\n".join(names), "utf-8")
    assert read_labels(tmp_path / name) == names


def test_a_file_of_labels_that_is_not_there_is_named_as_such(tmp_path):
    with pytest.raises(BadRequest, match=r"nosuch\.txt: no such file; give a file with the labels"):
        read_labels(tmp_path / "nosuch.txt")
    with pytest.raises(BadRequest, match=r"labels cannot be read \(Is a directory"):
        read_labels(tmp_path)


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
