"""`inspect`: the table of sites, as text, data and a page."""
