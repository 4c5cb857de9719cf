"""`inspect`: the sites of a model, and the reports of its passes, as text, data and a page."""
