"""The page that shows the graph of the whole mesh: `mesh-controller run --page-listen`."""
