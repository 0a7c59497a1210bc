"""ImageNet's classes under the names that others give them."""

from vit_jax.data.imagenet import class_names, same_classes


def test_class_names():
    names = class_names()
    assert len(names) == len(set(names)) == 1000
    assert {index: names[index] for index in (0, 1, 207, 281, 404, 988, 999)} == {
        0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 404: "airliner",
        988: "acorn", 999: "toilet tissue"}
    assert all(name == name.strip() and name for name in names)


def test_other_spellings():
    """WordNet ids and what Hugging Face writes, as timm has both."""
    from torch_shim import timm

    info = timm.data.ImageNetInfo()
    ids, names = info.label_names(), [info.index_to_description(i) for i in range(1000)]
    for some in (ids, names, class_names()):
        for others in (ids, names, class_names()):
            assert same_classes(some, others)
        # ... but in their order, and all of them.
        swapped = [*some[1:], some[0]]
        assert not same_classes(swapped, some)
        assert not same_classes(some[:-1], class_names())


def test_other_classes():
    assert same_classes(("cat", "dog"), ["cat", "dog"])
    assert not same_classes(("cat", "dog"), ("dog", "cat"))
    numbers = tuple(map(str, range(1000)))
    assert not same_classes(numbers, class_names()) and same_classes(numbers, list(numbers))
