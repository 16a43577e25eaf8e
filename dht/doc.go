// Package dht is a node's place in the overlay: the libp2p host (TCP, TLS 1.3, yamux), the cluster's private kad-dht, and the door
// through which newcomers are admitted and members make themselves known. It deals in bytes, keys, peers and epochs and knows no
// product nouns; who is a member, what an admission commits and what a record means are injected (Config).
//
// It is not the failure detector (dht/members: it uses Peers().Notify and Probe), not the store of replicated records (dht/records:
// kad-dht serves what that package wrote into the shared Datastore) and not the arbiter.
//
// # Order of a start
//
// New builds everything without a port; the node registers its handlers at Peers() and then calls Start. A node that is no member yet
// calls Join, starts its view from the Welcome, makes Config.Certificate return the certificate, and calls Greet.
//
// # Who gets in
//
// The TLS handshake proves who a peer is; every stream handler of Peers and of kad-dht asks whether that is a member. A stranger may
// connect and use identify, /coppice/join/1 and /coppice/hello/1 only; everything else is reset, logged once, and its connection is
// closed after 2 s unless it was admitted. A member that a peer has not heard of is let in by its certificate: the dialer of each new
// connection says hello, and streams that arrive before that wait for it, at most a second.
//
// A join is refused by an answer with a reason. An answer that does not come is a refusal too: libp2p's own Connect succeeds even
// where the other side closes the connection at once.
//
// # Reading from outside
//
// Any kad-dht client can read the cluster's records, given a certificate. With a token:
//
//	h, _ := libp2p.New(libp2p.NoListenAddrs)
//	w, err := dht.JoinCluster(ctx, h, token, nil, true)                 // a certificate for a client: no node, in no view
//	stop := dht.GreetEveryone(h, w.Cluster, w.Certificate, nil)         // shows it on every connection the host dials
//	defer stop()
//	kad, err := kaddht.New(h, kaddht.Mode(kaddht.ModeClient), kaddht.ProtocolPrefix(dht.KadPrefix(w.Cluster)),
//		kaddht.NamespacedValidator(dht.Namespace, validator))           // of package records, or one that accepts all
//	value, err := kad.GetValue(ctx, "/kb/nodes/…")
//
// kaddht is github.com/libp2p/go-libp2p-kad-dht, unchanged; TestStockClientReadsARecord is this program. In another language the steps
// are: open /coppice/join/1, send one length-delimited coppice.dht.v1.JoinRequest, read one JoinReply; then on every new connection
// send coppice.dht.v1.Hello on /coppice/hello/1.
//
// # Limits
//
// 8,192 connections, of which 1,024 from one address; 16 connections and 4,096 streams per peer; a join request of 64 KiB; 8 joins at a
// time; a welcome of 16 MiB. Above 256 connections unprotected ones are trimmed to 128.
//
// # Goroutines
//
// Kad: one that reconciles the routing table with the view every 15 s, until Close. door: one per hello this node says (at most 2 s),
// ended by Close; timers that close strangers' connections. GreetEveryone: one per connection (at most 2 s), until stop. The handlers
// of join and hello run in libp2p's goroutine of their stream. The rest are libp2p's and kad-dht's.
package dht
