"""Graphs that are loaded ahead, in threads: the same graphs and errors, and none stays open."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import BRIDGE, DECODER, VISION
from blip2edge.errors import BundleError
from blip2edge.runtime.backends import open_graph
from blip2edge.runtime.backends.open_graph import GraphOpener
from blip2edge.runtime.captioning.captioner import Captioner

GRAPHS = (DECODER, VISION, BRIDGE)


class Graph:
    """Stands for a loaded graph."""

    input_names = output_names = ()

    def __init__(self, name: str, opened: list[Graph]) -> None:
        self.name, self.closed = name, False
        opened.append(self)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Two cores, and stand-ins for graphs: the list of those that were opened."""
    found: list[Graph] = []
    monkeypatch.setattr(open_graph, "cores", lambda: 2)
    monkeypatch.setattr(GraphOpener, "_open", lambda self, name: Graph(name, found))
    return found


def test_two_graphs_are_opened_at_once(tiny_bundle: Path, opened: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=10)

    def wait_for_the_other(self: GraphOpener, name: str) -> Any:
        both.wait()
        return Graph(name, opened)

    monkeypatch.setattr(GraphOpener, "_open", wait_for_the_other)
    graphs = GraphOpener(Bundle.open(tiny_bundle), "cpu", 1)
    graphs.open_ahead((VISION, DECODER))
    found: list[Any] = [graphs(DECODER), graphs(VISION)]
    assert [graph.name for graph in found] == [DECODER, VISION]
    assert len(opened) == 2  # a call takes the graph that was opened ahead


def test_a_graph_that_nobody_asked_for_is_closed(tiny_bundle: Path, opened: list[Graph]) -> None:
    graphs = GraphOpener(Bundle.open(tiny_bundle), "cpu", 1)
    graphs.open_ahead(GRAPHS)
    graphs(VISION)
    graphs.close()
    assert opened  # those that had not begun are never opened
    assert all(graph.closed for graph in opened)


def test_an_error_is_raised_where_the_graph_is_asked_for(
    tiny_bundle: Path, opened: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_for_the_bridge(self: GraphOpener, name: str) -> Any:
        if name == BRIDGE:
            raise BundleError("the bridge is broken")
        return Graph(name, opened)

    monkeypatch.setattr(GraphOpener, "_open", fail_for_the_bridge)
    graphs = GraphOpener(Bundle.open(tiny_bundle), "cpu", 1)
    graphs.open_ahead(GRAPHS)
    graphs(VISION)
    with pytest.raises(BundleError, match="the bridge is broken"), graphs.closed_on_error():
        graphs(BRIDGE)
    assert all(graph.closed for graph in opened)


def test_a_name_that_the_bundle_lacks_is_left_out(tiny_bundle: Path, opened: list[Graph]) -> None:
    graphs = GraphOpener(Bundle.open(tiny_bundle), "cpu", 1)
    graphs.open_ahead((VISION, "text_embeds", DECODER))
    graphs(VISION), graphs(DECODER)
    assert sorted(graph.name for graph in opened) == sorted((VISION, DECODER))


@pytest.mark.parametrize(("cores", "names"), [(1, GRAPHS), (4, (VISION,))])
def test_one_core_or_one_graph_needs_no_thread(
    cores: int, names: tuple[str, ...], tiny_bundle: Path, opened: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_graph, "cores", lambda: cores)
    graphs = GraphOpener(Bundle.open(tiny_bundle), "cpu", 1)
    graphs.open_ahead(names)
    assert not opened


def test_a_captioner_opens_its_graphs_ahead(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plain = GraphOpener.open_ahead

    def recorded(self: GraphOpener, graphs: Any, after: str) -> None:
        assert after == DECODER
        asked.extend(graphs)
        plain(self, graphs, after)

    monkeypatch.setattr(open_graph, "cores", lambda: 2)
    monkeypatch.setattr(GraphOpener, "open_ahead", recorded)
    with Captioner.load(tiny_bundle, threads=1) as captioner:
        assert set(GRAPHS) <= set(asked)
        assert not captioner.graphs._ahead  # every graph that was opened is used


def test_the_decoder_is_loaded_before_the_others(
    tiny_bundle: Path, opened: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that the process fills while the decoder is loaded is moved to huge pages."""
    ready = threading.Event()

    def open_one(self: GraphOpener, name: str) -> Any:
        if name == DECODER:
            ready.wait(0.2)  # the others would be opened meanwhile
        return Graph(name, opened)

    monkeypatch.setattr(GraphOpener, "_open", open_one)
    graphs = GraphOpener(Bundle.open(tiny_bundle), "cpu", 1)
    graphs.open_ahead(GRAPHS[::-1], after=DECODER)
    for name in GRAPHS:
        graphs(name)
    assert opened[0].name == DECODER
    assert len(opened) == 3


def test_one_graph_that_cannot_be_closed_leaves_no_other_open(tiny_bundle: Path, opened: list[Graph]) -> None:
    graphs = GraphOpener(Bundle.open(tiny_bundle), "cpu", 1)
    for name in GRAPHS:
        graphs(name)

    def broken() -> None:
        raise RuntimeError("the device is gone")

    opened[1].close = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the device is gone"):
        graphs.close()
    assert opened[0].closed
    assert opened[2].closed
