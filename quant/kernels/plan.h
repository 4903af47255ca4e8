// The step's plan, uint32: a header, items [bundles * GROUP, 5], and behind them what the header points at.
#define ENTRIES_AT 0  // [entries]: the sequence of each
#define RUNS_AT 1     // [runs, 2]: first word, rows | kind << 30; of tails: first row | most rows << 15 | kind << 30
#define STARTS_AT 2   // [sequences + 1]: where the entries of each sequence begin in:
#define ORDER_AT 3    // [entries]: entries, by sequence
#define ROOM_AT 4     // entries that there is room for
#define ITEMS_AT 8    // first run, end run, first entry, end entry, position of the first row
