"""The same numbers under every layout: layouts as data, what is computed under each, and how two computations are compared."""
