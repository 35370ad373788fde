"""The losses of other projects, loaded from the user's own checkouts, as peers of `tropd conformance`.

Nothing of theirs is in this repository: an adapter names the files it loads and calls them with the inputs of a case.
It changes the form of these inputs (dtype, dimensions, padding columns), never the mathematics. docs/peers.md says what
was found, and at which commits.
"""
