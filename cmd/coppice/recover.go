package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// recoverTimeout is generous: newer checkpoints are fetched first.
const recoverTimeout = 10 * time.Minute

func (c *cli) recoverCmd() *cobra.Command {
	var from string
	var yes, keepOlder bool
	cmd := c.command(spec{
		group: groupNode, use: "recover", short: "Go on after most of the voters were lost for good",
		long: "After the loss of most voters the arbiter decides nothing until they are back. If they will not be, recover makes one survivor the\n" +
			"only voter, of the next incarnation; the others follow it and vote again, as do the lost ones should they return: what they held is put\n" +
			"aside in the folder lost+found of their data. It prints what each survivor holds and what may be lost, and does nothing without --yes\n" +
			"or a yes on the terminal. It refuses while a majority answers.\n\n" +
			"With the disks of all voters gone the registers are rebuilt: from what the survivor shows that has followed the arbiter furthest, and\n" +
			"from the signed copies that the DHT keeps of them, whichever is newer. The latter are enough, when all survivors were restarted, too.\n" +
			"Newer checkpoints than the registers know of, which their holders have, are adopted, unless --adopt-newer=false.",
		example: examples(
			"coppice recover", "what is there, what would be lost, then the question",
			"coppice recover --yes -o json", "in a script",
			"coppice recover --from n4 --yes", "from what another survivor has"),
		timeout: recoverTimeout,
		run: func(ctx context.Context, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Recover(ctx, &apiv1.RecoverRequest{From: from, KeepOlder: keepOlder})
			if err != nil {
				return err
			}
			if !res.GetPossible() {
				if err := c.show(res, func(w io.Writer) { c.recoverText(w, res) }); err != nil {
					return err
				}
				return &failure{what: "recover", why: res.GetReason(), try: "coppice status"}
			}
			if !yes {
				if err := c.show(res, func(w io.Writer) { c.recoverText(w, res) }); err != nil {
					return err
				}
				if c.json() || !c.sure("make what "+res.GetFrom()+" has the state that counts?") {
					return &failure{what: "recover", why: "nothing was done: it was not confirmed", try: "coppice recover --yes"}
				}
			}
			res, err = cl.Recover(ctx, &apiv1.RecoverRequest{From: from, Really: true, KeepOlder: keepOlder})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) {
				if yes {
					c.recoverText(w, res)
				}
				fmt.Fprintf(w, "recovered from %s: incarnation %d, in %s\n", res.From, res.Incarnation, msText(res.TookMs))
			})
		},
	})
	cmd.Flags().StringVar(&from, "from", "", "`NODE` whose log, or view, is to count (default: the best)")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it without a question")
	adopt := cmd.Flags().Bool("adopt-newer", true, "adopt checkpoints that are newer than the registers know")
	cmd.PreRun = func(*cobra.Command, []string) { keepOlder = !*adopt }
	return cmd
}

// sure asks on the terminal; elsewhere the answer is no.
func (c *cli) sure(question string) bool {
	if !c.errTTY {
		return false
	}
	fmt.Fprintf(c.err, "%s [y/N] ", question)
	line, err := bufio.NewReader(c.in).ReadString('\n')
	if err != nil {
		return false
	}
	answer := strings.ToLower(strings.TrimSpace(line))
	return answer == "y" || answer == "yes"
}

// showsText is how far a node's view reaches, with or without a log of its own.
func showsText(s *apiv1.Survivor) any {
	if s.GetShownIndex() == 0 {
		return ""
	}
	return fmt.Sprintf("%d registers, entry %d", s.GetShownRegisters(), s.GetShownIndex())
}

func (c *cli) recoverText(w io.Writer, r *apiv1.RecoverResponse) {
	t := c.table("SURVIVOR", "ROLE", "INCARNATION", "TERM", "LAST ENTRY", "COMMITTED", "REGISTERS", "SHOWS", "LEADER")
	for _, s := range r.GetSurvivors() {
		name := cell{s.Node, ""}
		if s.Node == r.From {
			name = cell{s.Node + " *", green}
		}
		t.row(name, s.Role, s.Incarnation, s.Term, s.LastIndex, s.Committed, s.Registers, showsText(s), s.Leader)
	}
	t.write(w)
	if b := r.GetRebuilt(); r.GetRebuild() && b != nil {
		fmt.Fprintf(w, "no survivor has a log that goes as far: the registers are rebuilt, %d from what %s shows and %d from newer copies in the DHT (%d of %d nodes answered)\n",
			b.GetFromView(), r.GetFrom(), b.GetFromDht(), b.GetAnswered(), b.GetAsked())
		fmt.Fprintf(w, "to be rebuilt: %s, %s, %s, %s\n", plural(int(b.GetApplications()), "application", "applications"), plural(int(b.GetInstances()), "instance", "instances"),
			plural(int(b.GetArtifacts()), "artifact", "artifacts"), plural(int(b.GetMembers()), "member", "members"))
	} else if b.GetFromDht() > 0 {
		fmt.Fprintf(w, "newer than the log: copies in the DHT of %s\n", plural(int(b.GetFromDht()), "register", "registers"))
	}
	for _, m := range r.GetMissing() {
		line := fmt.Sprintf("missing voter: %s, %s", m.Node, m.State)
		if m.Since != nil {
			line += " for " + c.sinceText(m.Since)
		}
		fmt.Fprintln(w, line)
	}
	for _, a := range r.GetAdopted() {
		if a.Reason != "" {
			fmt.Fprintf(w, "newer checkpoint: %s %d (its register knows %d), not to be adopted: %s\n", a.Instance, a.Seq, a.RegisterSeq, oneLine(a.Reason))
			continue
		}
		fmt.Fprintf(w, "newer checkpoint: %s %d (its register knows %d), held by %s, to be adopted\n", a.Instance, a.Seq, a.RegisterSeq, join(a.Holders))
	}
	for _, l := range r.GetLost() {
		fmt.Fprintln(w, c.paint(yellow)("may be lost:"), oneLine(l))
	}
}
