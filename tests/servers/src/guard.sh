# Runs a server for a test process that gives orders on standard input, one a line. When that ends,
# as it does however the test process dies, the server is killed and its directory removed.
#
# $1 is the directory, the rest is the server's command, which must stay one process (`exec`).
# Each order is answered by the server's process id.
directory=$1
shift
server=
# The kernel hangs up on a process group whose parent ends while one of its processes is stopped: a
# server that was paused, or one that this shell has just begun to end.
trap : HUP

# A process id may be somebody else's once ours is gone.
ours() {
    [ -n "$server" ] && grep -qs "^PPid:[[:space:]]*$$\$" "/proc/$server/status"
}

# PostgreSQL is one process a connection, each with a process group of its own.
children() {
    grep -ls "^PPid:[[:space:]]*$server\$" /proc/[0-9]*/status | cut -d/ -f3
}

# The parent is stopped first, so that no child is missed.
each() {
    ours && kill -STOP "$server" && kill "-$1" $(children) "$server"
} 2>/dev/null

while read -r order; do
    case $order in
    start)
        "$@" </dev/null >>"$directory/log" 2>&1 &
        server=$!
        ;;
    # The server's own way to end; whoever ordered it sees when it has.
    INT | TERM) ours && kill "-$order" "$server" ;;
    STOP | CONT | KILL) each "$order" ;;
    esac
    echo "$server"
done
# PostgreSQL leaves shared memory behind unless it is asked first; this is its fastest way to end.
each QUIT
each CONT
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    kill -0 "$server" 2>/dev/null && sleep 0.05
done
each KILL
# What the server has started may go on writing for a moment, as MariaDB's installation does.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    rm -rf "$directory" 2>/dev/null && break
    sleep 0.5
done
