// Package dirstate makes a directory of a program that knows nothing of checkpoints the state of a component: what changed in it since a mark, as frames of
// the contract, and the directory again from those frames.
//
// A Tree keeps beside the directory a mirror: a second directory with the content of the last snapshot. A snapshot compares the files with the mirror in
// blocks of 64 KiB and copies what differs, twice: once while the program runs, so that there is little left, and once while it stands still. So the program
// stands still for as long as it takes to compare what it wrote during the first pass, and what is sent afterwards, however slowly, is one moment of the
// directory. A comparison with the bytes themselves is exact where one by digests were only very likely so.
//
// A file whose size, inode, change time and modification time are those of the last comparison costs a stat. A change that the clock of the file system is
// too coarse to show is found all the same: a file that was changed in the tick of the clock in which it was compared is compared again. So is one that is
// mapped into memory for writing, whose changes need not show in its times at all.
//
// Kept are regular files with their permissions and modification times, directories, and symbolic links that lead to somewhere within. A link that leads
// out makes the snapshot fail: what it leads to is not on the next node. Left out are sockets, pipes and devices. Hard links become files of their own; owners,
// extended attributes and the times of directories are not kept. Holes stay holes where a whole block is zeros.
//
// It starts no goroutines.
//
// # Limits
//
// The mirror takes as much room on the disk as the directory. In memory are some 300 bytes a file and 8 bytes a block, and two blocks while it works. At most
// 4 KiB of path. What was removed is remembered 65,536 times; who asks for changes since before that gets everything.
package dirstate
