"""Does a component keep its promises? Checks that run over the list of all of them."""
