"""`weitiao check`: what is wrong with rows, found in seconds, shown in a terminal or as a page, mended where safe."""
