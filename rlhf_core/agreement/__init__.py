"""How far annotators agree, with each other, with themselves and with known answers."""
