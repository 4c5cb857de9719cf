"""Where a model comes from: one class for each origin, with what capture has to know about it."""
