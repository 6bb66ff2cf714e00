"""What leads where in a network, as a graph of networkx (which torch brings); imported when a network is first cut."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

import networkx as nx

__all__ = ["Flow"]


class Flow:
    """Values that are made of each other.

    Args:
        values: all of them.
        edges: from a value to one that is made of it.

    >>> flow = Flow("abcd", [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])
    >>> sorted(flow.behind(["d"])), flow.cuts("a", "d")
    (['a', 'b', 'c', 'd'], ['d'])
    """

    def __init__(self, values: Iterable[Hashable], edges: Iterable[tuple[Hashable, Hashable]]) -> None:
        self._graph = nx.DiGraph()
        self._graph.add_nodes_from(values)
        self._graph.add_edges_from(edges)

    def behind(self, ends: Collection[Hashable], stop: Collection[Hashable] = ()) -> set:
        """What ``ends`` are made of, with them, not looking behind ``stop``, which is left out itself."""
        flow = nx.subgraph_view(self._graph, filter_edge=lambda _, made: made not in stop)
        return set(ends).union(*(nx.ancestors(flow, end) for end in ends if end in flow)) - set(stop)

    def depending(self, start: Collection[Hashable], among: Collection[Hashable]) -> set:
        """What of ``among`` depends on ``start`` through others of them, with ``start``."""
        flow = nx.subgraph_view(self._graph, filter_edge=lambda _, made: made in among)
        return set(start).union(*(nx.descendants(flow, value) for value in start if value in flow))

    def cuts(self, start: Hashable, end: Hashable) -> list:
        """The values through which every way from ``start`` to ``end`` leads, without ``start``, in order."""
        if end not in self.depending([start], self._graph):
            return []
        found, dominator = [end], nx.immediate_dominators(self._graph, start)
        while dominator[found[-1]] != start:
            found.append(dominator[found[-1]])
        return found[::-1]
