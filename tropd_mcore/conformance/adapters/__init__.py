"""The losses of other projects as peers of `tropd conformance`, loaded from checkouts that the user provides.

This repository contains none of their code. An adapter names the files that it loads and calls them with the inputs of
a case. It changes the form of these inputs (dtype, dimensions, padding columns), never the mathematics. docs/peers.md
has the findings and the commits.
"""
