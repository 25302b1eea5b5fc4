"""How far MRA-2 and Nyström attention are from exact softmax attention, and what they cost: `farspan bench
approximation`."""
