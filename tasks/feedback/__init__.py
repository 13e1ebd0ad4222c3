"""What people say about answers: where votes are kept, asked for, exchanged and examined."""
